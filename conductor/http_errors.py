"""Errors as HTTP says them: OpenAI's body, a status, Retry-After."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    LeaseExpired,
    ModelNotFound,
    NoWorker,
    Overloaded,
    PeerGone,
    PermissionDenied,
    TakenOver,
    TransportError,
    Unauthenticated,
    WorkerLost,
)

ExceptionHandler = Callable[[Request, Exception], Awaitable[Response]]

log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[BatonError], int, str], ...] = (
    (ModelNotFound, 404, "invalid_request_error"),
    (InvalidRequest, 400, "invalid_request_error"),
    (Unauthenticated, 401, "authentication_error"),
    (PermissionDenied, 403, "permission_error"),
    (Overloaded, 429, "rate_limit_error"),
    (TakenOver, 409, "server_error"),
    (NoWorker, 503, "service_unavailable_error"),
    (Cancelled, 503, "service_unavailable_error"),
    (WorkerLost, 502, "server_error"),
    (PeerGone, 502, "server_error"),
    (LeaseExpired, 502, "server_error"),
    (TransportError, 502, "server_error"),
    (DeadlineExceeded, 504, "timeout_error"),
)
_STATUS_OF_CODE = {"body_too_large": 413, "not_found": 404, "body_timeout": 408}


class JsonResponse(Response):
    """A body by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def status_and_type(error: BaseException) -> tuple[int, str]:
    """The HTTP status and OpenAI's error type for `error`."""
    for cls, status, kind in _STATUS:
        if isinstance(error, cls):
            return _STATUS_OF_CODE.get(getattr(error, "code", ""), status), kind
    return 500, "server_error"


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's shape. What a bug says stays in the log."""
    known = error if isinstance(error, BatonError) else InternalError("an internal error occurred")
    return {
        "error": {
            "message": known.message,
            "type": status_and_type(known)[1],
            "param": getattr(known, "param", None),
            "code": known.code,
        }
    }


def error_response(error: BaseException, request_id: str | None = None) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        # Whole seconds would bring together who is told different times; OpenAI's clients know it.
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1e3))
    elif isinstance(error, NoWorker):
        headers["retry-after"] = "1"
    elif isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    if request_id is not None:
        headers["x-request-id"] = request_id
    return JsonResponse(error_body(error), status_code=status_and_type(error)[0], headers=headers)


def error_handlers() -> dict[Any, ExceptionHandler]:
    """They give every error of the app OpenAI's shape, those of the framework included."""

    async def on_baton_error(_request: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        what = f"{request.method} {request.url.path[:200]}"
        if error.status_code == 404:
            return error_response(InvalidRequest(f"there is no {what} here", code="not_found"))
        body = {
            "message": f"{what}: {error.detail}",
            "type": "invalid_request_error",
            "param": None,
            "code": "method_not_allowed" if error.status_code == 405 else None,
        }
        return JsonResponse(
            {"error": body}, status_code=error.status_code, headers=dict(error.headers or {})
        )

    async def on_bug(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(error)

    return {BatonError: on_baton_error, HTTPException: on_http_error, Exception: on_bug}
