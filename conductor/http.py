"""The HTTP API: OpenAI's endpoints, health, metrics, the fleet and traces."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Sequence

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.errors import InvalidRequest, Unauthenticated
from conductor.cluster import ConductorIdentity, describe_cluster
from conductor.http_errors import JsonResponse, add_error_handlers
from conductor.http_generate import DIRECT_SEND, GenerationResponse, StreamResponse
from conductor.openai import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_body,
)
from conductor.openai_reply import ChatReply, CompletionReply, Reply
from conductor.service import Conductor
from conductor.validate import check_model, check_token_ids, quote

BODY_TIMEOUT_S = 60.0
_PROBE = ["GET", "HEAD"]  # load balancers like to ask by HEAD


def make_app(
    conductor: Conductor,
    identity: ConductorIdentity,
    max_body_bytes: int,
    api_keys: Sequence[str] = (),
) -> FastAPI:
    """The application. Its lifespan is the process's business, not its own."""
    app = FastAPI(
        title="baton", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    add_error_handlers(app)
    app.include_router(_open_routes(conductor, identity))
    guard = [Depends(_key_check(api_keys))] if api_keys else []
    app.include_router(_guarded_routes(conductor, identity, max_body_bytes), dependencies=guard)
    return app


def with_direct_send(app: ASGIApp) -> ASGIApp:
    """Keeps the server's own `send` in the scope: the bytes of a stream go past the framework's
    wrappers, which only look at how a response starts, and cost a token several microseconds."""

    async def keep_send(scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECT_SEND] = send
        await app(scope, receive, send)

    return keep_send


def _open_routes(conductor: Conductor, identity: ConductorIdentity) -> APIRouter:
    router = APIRouter()

    @router.api_route("/health", methods=_PROBE)
    async def health() -> Response:
        return JsonResponse({"status": "ok"})

    @router.api_route("/ready", methods=_PROBE)
    async def ready() -> Response:
        if conductor.ready:
            return JsonResponse({"status": "ready"})
        return JsonResponse({"status": "not ready"}, status_code=503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(
            conductor.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    @router.get("/cluster")
    async def cluster() -> Response:
        return JsonResponse(describe_cluster(conductor, identity))

    return router


def _guarded_routes(
    conductor: Conductor, identity: ConductorIdentity, max_body_bytes: int
) -> APIRouter:
    router = APIRouter()

    async def generate(
        request: Request, body_class: type[ChatBody] | type[CompletionBody], prefix: str
    ) -> Response:
        body = parse_body(body_class, await read_body(request, max_body_bytes))
        prepared = await conductor.prepare(body.to_ask(), prefix)
        tokenizer = conductor.model.tokenizer
        reply: Reply
        if isinstance(body, ChatBody):
            reply = ChatReply(prepared, tokenizer)
        else:
            reply = CompletionReply(prepared, tokenizer)
        if not body.stream:
            return GenerationResponse(conductor, prepared, reply)
        return StreamResponse(
            conductor, prepared, reply, body.include_usage, body.usage_in_every_chunk
        )

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await generate(request, ChatBody, "chatcmpl")

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await generate(request, CompletionBody, "cmpl")

    @router.get("/v1/models")
    async def models() -> Response:
        return JsonResponse({"object": "list", "data": [_model_body(conductor, identity)]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        check_model(name, conductor.limits)
        return JsonResponse(_model_body(conductor, identity))

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = parse_body(TokenizeBody, await read_body(request, max_body_bytes))
        limits = conductor.limits
        check_model(body.model or limits.model_name, limits)
        ids = await conductor.tokenize(body.to_prompt(), body.add_special_tokens)
        return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": limits.context})

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = parse_body(DetokenizeBody, await read_body(request, max_body_bytes))
        limits = conductor.limits
        check_model(body.model or limits.model_name, limits)
        check_token_ids(body.tokens, limits, "tokens")
        return JsonResponse({"prompt": await conductor.detokenize(tuple(body.tokens))})

    @router.get("/trace/{request_id:path}")
    async def trace(request_id: str) -> Response:
        timeline = conductor.traces.get(request_id)
        if timeline is None:
            raise InvalidRequest(
                f"no trace of request {quote(request_id)}: it is unknown or too long ago",
                param="request_id",
                code="not_found",
            )
        return JsonResponse(timeline.as_json())

    return router


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises InvalidRequest (413) beyond `limit` bytes, before reading them."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise body_too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise body_too_large(limit)
                parts.append(part)
    except ClientDisconnect:
        raise InvalidRequest("the client went away before it had sent its request") from None
    except TimeoutError:
        raise InvalidRequest(
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s", code="body_timeout"
        ) from None
    return b"".join(parts)


def body_too_large(limit: int) -> InvalidRequest:
    return InvalidRequest(
        f"the request is larger than {limit} bytes: send less, or start the conductor with another "
        "--max-body-bytes",
        code="body_too_large",
    )


def _model_body(conductor: Conductor, identity: ConductorIdentity) -> dict[str, object]:
    return {
        "id": conductor.model.name,
        "object": "model",
        "created": int(identity.started_s),
        "owned_by": "baton",
        "max_model_len": conductor.limits.context,
    }


def _key_check(keys: Sequence[str]) -> Callable[[Request], Awaitable[None]]:
    known = [key.encode() for key in keys]

    async def check(request: Request) -> None:
        check_key(request.headers.get("authorization"), known)

    return check


def check_key(authorization: str | None, keys: Sequence[bytes]) -> None:
    """Raises Unauthenticated unless `authorization` is `Bearer KEY` with one of `keys`."""
    scheme, _, given = (authorization or "").partition(" ")
    found = [hmac.compare_digest(given.strip().encode(), key) for key in keys]
    if scheme.lower() != "bearer" or not any(found):
        raise Unauthenticated("send a valid API key in the header `Authorization: Bearer KEY`")
