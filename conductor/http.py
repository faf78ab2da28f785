"""The HTTP API: OpenAI's endpoints, health, metrics, the fleet, traces and the live page."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.errors import InvalidRequest
from baton.types.trace import TRACEPARENT, TRACESTATE, parse_trace_context
from conductor.cluster import ConductorIdentity, describe_cluster, other_conductors
from conductor.event_stream import keepalive_headers
from conductor.http_errors import JsonResponse, error_handlers
from conductor.http_generate import DIRECT_SEND, GenerationResponse, StreamResponse
from conductor.http_keys import tenant_of, with_admin_key, with_key
from conductor.http_live import live_routes, page_routes
from conductor.openai import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_body,
)
from conductor.openai_reply import ChatReply, CompletionReply, Reply
from conductor.openapi import make_document
from conductor.request import Arrival
from conductor.service import Conductor
from conductor.tenants.tenancy import check_allowed
from conductor.trace_json import timeline_json
from conductor.validate import check_model, check_token_ids, quote

BODY_TIMEOUT_S = 60.0


def make_app(
    conductor: Conductor,
    identity: ConductorIdentity,
    max_body_bytes: int,
    private_status: bool = False,
) -> Starlette:
    """The application. Its lifespan is the process's business, not its own. With `private_status`
    only an admin's key opens metrics and the fleet."""
    tenancy = conductor.tenancy
    guarded = _guarded_routes(conductor, identity, max_body_bytes)
    status = _status_routes(conductor, identity)
    live = live_routes(conductor, identity)
    if not tenancy.directory.is_open:
        guarded = [with_key(route, tenancy) for route in guarded]
        live = [with_admin_key(route, tenancy) for route in live]  # it shows everybody's requests
        if private_status:
            status = [with_admin_key(route, tenancy) for route in status]
    app = Starlette(
        routes=[*page_routes(), *_open_routes(conductor), *status, *live, *guarded],
        exception_handlers=error_handlers(),
    )
    app.router.redirect_slashes = False
    return app


def with_direct_send(app: ASGIApp) -> ASGIApp:
    """Keeps the server's own `send` in the scope: the bytes of a stream go past the framework's
    wrappers, which only look at how a response starts, and cost a token several microseconds."""

    async def keep_send(scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECT_SEND] = send
        await app(scope, receive, send)

    return keep_send


def _open_routes(conductor: Conductor) -> list[Route]:
    with_key = not conductor.tenancy.directory.is_open

    async def health(_request: Request) -> Response:
        return JsonResponse({"status": "ok"})

    async def ready(_request: Request) -> Response:
        if conductor.ready:
            return JsonResponse({"status": "ready"})
        return JsonResponse({"status": "not ready"}, status_code=503)

    async def document(_request: Request) -> Response:
        return JsonResponse(make_document(conductor.limits, with_key))

    return [  # GET includes HEAD, which load balancers like to ask by
        Route("/openapi.json", document),
        Route("/health", health),
        Route("/ready", ready),
    ]


def _status_routes(conductor: Conductor, identity: ConductorIdentity) -> list[Route]:
    async def metrics(request: Request) -> Response:
        encode = conductor.metrics.snapshot().encode  # in a thread: streams go on meanwhile
        body, content_type = await asyncio.to_thread(encode, request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def cluster(_request: Request) -> Response:
        body = describe_cluster(conductor, identity)
        body["conductors"] += await other_conductors(conductor, identity)
        return JsonResponse(body)

    return [Route("/metrics", metrics), Route("/cluster", cluster)]


def _guarded_routes(
    conductor: Conductor, identity: ConductorIdentity, max_body_bytes: int
) -> list[Route]:
    async def generate(
        request: Request, body_class: type[ChatBody] | type[CompletionBody], prefix: str
    ) -> Response:
        content = await read_body(request, max_body_bytes)
        arrival = arrival_of(request)
        body = parse_body(body_class, content)
        token = request.headers.get("last-event-id")
        if token is not None and not body.stream:
            raise InvalidRequest("only a stream can be gone on with", param="Last-Event-ID")
        prepared = await conductor.prepare(
            body.to_ask(), prefix, resume_token=token, arrival=arrival
        )
        tokenizer = conductor.model.tokenizer
        form: type[Reply] = ChatReply if isinstance(body, ChatBody) else CompletionReply
        reply = form(prepared, tokenizer, bool(body.return_token_ids))
        if not body.stream:
            return GenerationResponse(conductor, prepared, reply)
        return StreamResponse(
            conductor, prepared, reply, body.include_usage, body.usage_in_every_chunk
        )

    async def chat(request: Request) -> Response:
        return await generate(request, ChatBody, "chatcmpl")

    async def completions(request: Request) -> Response:
        return await generate(request, CompletionBody, "cmpl")

    async def models(request: Request) -> Response:
        seen = tenant_of(request).may_use(conductor.model.name)
        body = {"object": "list", "data": [_model_body(conductor, identity)] if seen else []}
        # Clients that ask for the models first know it before their first stream.
        return JsonResponse(body, headers=keepalive_headers(conductor.policy.keepalive_s))

    async def model(request: Request) -> Response:
        check_model(request.path_params["name"], conductor.limits)
        check_allowed(tenant_of(request), conductor.model.name)
        return JsonResponse(_model_body(conductor, identity))

    async def tokenize(request: Request) -> Response:
        body = parse_body(TokenizeBody, await read_body(request, max_body_bytes))
        limits = conductor.limits
        if body.model is not None:
            check_model(body.model, limits)
        check_allowed(tenant_of(request), limits.model_name)
        ids = await conductor.tokenize(body.to_prompt(), body.add_special_tokens)
        return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": limits.context})

    async def detokenize(request: Request) -> Response:
        body = parse_body(DetokenizeBody, await read_body(request, max_body_bytes))
        limits = conductor.limits
        if body.model is not None:
            check_model(body.model, limits)
        check_allowed(tenant_of(request), limits.model_name)
        check_token_ids(body.tokens, limits, "tokens")
        return JsonResponse({"prompt": await conductor.detokenize(tuple(body.tokens))})

    async def trace(request: Request) -> Response:
        request_id = request.path_params["request_id"]
        timeline = conductor.traces.get(request_id)
        if timeline is None or not tenant_of(request).may_see(timeline.tenant):
            raise InvalidRequest(
                f"no trace of request {quote(request_id)}: it is unknown or too long ago",
                param="request_id",
                code="not_found",
            )
        now_s = conductor.traces.epoch_s + asyncio.get_running_loop().time()
        return JsonResponse(timeline_json(timeline, now_s))

    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/trace/{request_id:path}", trace),
    ]


def arrival_of(request: Request) -> Arrival:
    """Of a request whose body has come just now."""
    headers = request.headers
    caller = parse_trace_context(headers.getlist(TRACEPARENT), headers.getlist(TRACESTATE))
    return Arrival(asyncio.get_running_loop().time(), caller, tenant_of(request))


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
