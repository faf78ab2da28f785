"""The gRPC API, `baton.v1.Inference`: the same requests and errors as over HTTP.

A failed call carries the error's stable code in the trailing metadata `baton-error-code`, and the
field at fault, where there is one, in `baton-error-param`; RESOURCE_EXHAUSTED has `retry-after-ms`.
How a tenant stands with its limits is there too, in the names that HTTP's headers have.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, NoReturn

import grpc

from baton.errors import InternalError, InvalidRequest, Overloaded
from baton.logs import traced
from baton.rpc.errors import status_of, trailing_metadata
from baton.tokenizer import Tokenizer
from baton.types.request import SampledToken
from baton.types.trace import TRACEPARENT, TRACESTATE, parse_trace_context
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from conductor.answer_run import Delta
from conductor.dispatch import Usage
from conductor.http import body_too_large
from conductor.request import Arrival, Ask, Options, Prompt, Request
from conductor.resume import Bookmark
from conductor.service import Conductor
from conductor.tenants.tenancy import check_allowed
from conductor.tenants.tenant import ANYBODY, Tenant
from conductor.validate import DEFAULT_COMPLETION_TOKENS, check_model, make_chat

SERVICE_NAME = "baton.v1.Inference"
PARAM_KEY = "baton-error-param"
RETRY_KEY = "retry-after-ms"

Metadata = tuple[tuple[str, str], ...]

log = logging.getLogger(__name__)


def add_inference(server: grpc.aio.Server, conductor: Conductor, max_bytes: int) -> None:
    """Serve the public API on `server`. Requests may have `max_bytes` bytes."""
    servicer = _InferenceServicer(conductor, max_bytes)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)


class _InferenceServicer(inference_pb2_grpc.InferenceServicer):  # type: ignore[misc]
    def __init__(self, conductor: Conductor, max_bytes: int) -> None:
        self._conductor = conductor
        self._max_bytes = max_bytes

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """grpc cancels this coroutine when the client cancels, goes, or its deadline passes; the
        generator's clean-up then cancels the work."""
        conductor = self._conductor
        arrival = _arrival_of(context)
        tenant = ANYBODY
        try:
            tenant = self._check(request, context)
            arrival = replace(arrival, tenant=tenant)
            timeout_s = context.time_remaining()
            token = request.resume_token or None
            prepared = await conductor.prepare(_to_ask(request), "gen", timeout_s, token, arrival)
            with traced(prepared.tracing.context):
                await self._answer(prepared, context)
            context.set_trailing_metadata(self._standing(tenant))
        except Exception as error:
            await _abort(context, error, self._standing(tenant))

    async def _answer(self, request: Request, context: grpc.aio.ServicerContext) -> None:
        conductor = self._conductor
        bookmark = Bookmark(request)
        with_details = request.answers[0].sampling.logprobs is not None
        async with aclosing(conductor.generate(request)) as results:
            async for result in results:
                for message in _messages(
                    request.id, result, conductor.model.tokenizer, with_details, bookmark
                ):
                    await context.write(message)

    async def Tokenize(  # noqa: N802
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        try:
            tenant = self._check(request, context)
            limits = self._conductor.limits
            check_model(request.model, limits)
            check_allowed(tenant, request.model)
            prompt = _to_prompt(request, request.WhichOneof("input"))
            ids = await self._conductor.tokenize(prompt, request.add_special_tokens)
            return pb.TokenizeResponse(token_ids=ids, max_model_len=limits.context)
        except Exception as error:
            await _abort(context, error)

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        try:
            tenant = self._check(request, context)
            limits = self._conductor.limits
            model = pb.Model(id=limits.model_name, max_model_len=limits.context)
            return pb.ListModelsResponse(models=[model] if tenant.may_use(model.id) else [])
        except Exception as error:
            await _abort(context, error)

    def _standing(self, tenant: Tenant) -> Metadata:
        """How the tenant stands with its limits."""
        return tuple(self._conductor.tenancy.headers(tenant).items())

    def _check(self, request: Any, context: grpc.aio.ServicerContext) -> Tenant:
        """Whose the call is. Raises Unauthenticated without a valid key, InvalidRequest for an
        oversized request."""
        given = dict(context.invocation_metadata() or ()).get("authorization")
        tenancy = self._conductor.tenancy
        tenant = tenancy.authenticate(given if isinstance(given, str) else None)
        if request.ByteSize() > self._max_bytes:
            raise body_too_large(self._max_bytes)
        return tenant


def _arrival_of(context: grpc.aio.ServicerContext) -> Arrival:
    """Of a request that has come just now."""
    given: dict[str, list[str]] = {TRACEPARENT: [], TRACESTATE: []}
    for key, value in context.invocation_metadata() or ():
        if key in given and isinstance(value, str):
            given[key].append(value)
    caller = parse_trace_context(given[TRACEPARENT], given[TRACESTATE])
    return Arrival(asyncio.get_running_loop().time(), caller)


async def _abort(
    context: grpc.aio.ServicerContext, error: Exception, more: Metadata = ()
) -> NoReturn:
    """End the call with the status of `error`. `more` is told in its trailing metadata."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = status_of(error)
    message = str(error)
    if status is grpc.StatusCode.INTERNAL:
        log.error("a gRPC call failed", exc_info=error)
        message = message if isinstance(error, InternalError) else "an internal error occurred"
    metadata = (*trailing_metadata(error), *more)
    param = getattr(error, "param", None)
    if param:
        metadata = (*metadata, (PARAM_KEY, param))
    if isinstance(error, Overloaded):
        metadata = (*metadata, (RETRY_KEY, str(math.ceil(error.retry_after_s * 1e3))))
    await context.abort(status, message, metadata)
    raise error


def _to_ask(request: pb.GenerateRequest) -> Ask:
    kind = request.WhichOneof("prompt")
    sampling = request.sampling
    options = Options(
        temperature=_given(sampling, "temperature"),
        top_p=_given(sampling, "top_p"),
        top_k=_given(sampling, "top_k"),
        min_p=_given(sampling, "min_p"),
        presence_penalty=_given(sampling, "presence_penalty"),
        frequency_penalty=_given(sampling, "frequency_penalty"),
        repetition_penalty=_given(sampling, "repetition_penalty"),
        logit_bias=dict(sampling.logit_bias) or None,
        seed=_given(sampling, "seed"),
        max_tokens=_given(sampling, "max_tokens"),
        min_tokens=_given(sampling, "min_tokens"),
        ignore_eos=_given(sampling, "ignore_eos"),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        logprobs=_given(sampling, "logprobs"),
        n=_given(sampling, "n"),
    )
    return Ask(
        model=request.model,
        prompts=(_to_prompt(request, kind),),
        options=options,
        request_id=request.request_id or None,
        priority=request.priority,
        cache_salt=request.cache_salt,
        cache_pin_s=_given(request, "cache_pin_s"),
        default_max_tokens=None if kind == "chat" else DEFAULT_COMPLETION_TOKENS,
    )


def _given(message: Any, name: str) -> Any:
    """The value of an optional field; None when the client did not set it."""
    return getattr(message, name) if message.HasField(name) else None


def _to_prompt(request: Any, kind: str | None) -> Prompt:
    if kind == "text":
        text: str = request.text
        return text
    if kind == "token_ids":
        return tuple(request.token_ids.ids)
    if kind == "chat":
        return make_chat([(message.role, message.content) for message in request.chat.messages])
    raise InvalidRequest("the request has no prompt: set text, token_ids or chat", param="prompt")


def _messages(
    request_id: str,
    result: list[Delta] | Usage,
    tokenizer: Tokenizer,
    with_details: bool,
    bookmark: Bookmark,
) -> Iterator[pb.GenerateResponse]:
    if isinstance(result, Usage):
        usage = pb.Usage(
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            cached_tokens=result.cached_tokens,
        )
        yield pb.GenerateResponse(request_id=request_id, usage=usage, resume_token=bookmark.token)
        return
    for delta in result:
        bookmark.note(delta)
        yield pb.GenerateResponse(
            request_id=request_id,
            index=delta.index,
            text=delta.text,
            token_ids=[token.token_id for token in delta.tokens],
            details=[_detail(token, tokenizer) for token in delta.tokens] if with_details else (),
            finish_reason=delta.finish_reason or "",
            resume_token=bookmark.token,
        )


def _detail(token: SampledToken, tokenizer: Tokenizer) -> pb.TokenDetail:
    logprob = token.logprob
    if logprob is None:
        return pb.TokenDetail(chosen=_choice(token.token_id, 0.0, tokenizer))
    return pb.TokenDetail(
        chosen=_choice(token.token_id, logprob.logprob, tokenizer),
        top=[_choice(number, value, tokenizer) for number, value in logprob.top],
    )


def _choice(token_id: int, logprob: float, tokenizer: Tokenizer) -> pb.TokenChoice:
    text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    return pb.TokenChoice(token_id=token_id, text=text, logprob=logprob)
