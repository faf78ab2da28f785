"""Errors as the server said them: an OpenAI-shaped body becomes an exception of baton.errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from baton.errors import (
    BY_CODE,
    BatonError,
    InternalError,
    InvalidRequest,
    NoWorker,
    Overloaded,
    Unauthenticated,
)

_BY_STATUS: dict[int, type[BatonError]] = {
    401: Unauthenticated,
    403: Unauthenticated,
    429: Overloaded,
    503: NoWorker,
}

_LONGEST_S = 3600.0  # nobody means more than that


def error_from(status: int, body: bytes, headers: Mapping[str, str]) -> BatonError:
    """The exception for a response with an error status, whoever wrote its body."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = None
    detail = parsed.get("error") if isinstance(parsed, dict) else None
    if not isinstance(detail, dict):
        text = body[:200].decode("utf-8", "replace").strip()
        detail = {"message": f"the server answered {status}: {text or 'no text'}"}
    return error_in(detail, status, _retry_after_s(headers))


def error_in(
    detail: Mapping[str, Any], status: int = 500, retry_after_s: float = 1.0
) -> BatonError:
    """The exception for an OpenAI-shaped `error` object, of a response or inside a stream."""
    message = str(detail.get("message") or "the server gave no reason")
    code = detail.get("code") or detail.get("type")
    kind = BY_CODE.get(str(code)) or _BY_STATUS.get(status)
    if kind is None:
        kind = InvalidRequest if 400 <= status < 500 else InternalError
    if issubclass(kind, Overloaded):
        return kind(message, retry_after_s)
    if issubclass(kind, InvalidRequest):
        return kind(message, param=detail.get("param"), code=str(code) if code else None)
    return kind(message)


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """The exact one, if there is one: Retry-After has whole seconds, or a date."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if 0.0 <= seconds < _LONGEST_S:
            return seconds
    return 1.0
