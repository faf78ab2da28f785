"""Codec of what baton/types/request.py defines. `*_to_pb` and `*_from_pb` are inverses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from baton.types.request import (
    AttemptId,
    GenerationTask,
    SampledToken,
    SamplingParams,
    TokenLogprob,
    WireError,
)
from baton.types.trace import TraceContext
from baton.v1 import common_pb2 as pb


def attempt_to_pb(value: AttemptId) -> pb.AttemptId:
    return pb.AttemptId(request_id=value.request_id, number=value.number)


def attempt_from_pb(message: pb.AttemptId) -> AttemptId:
    return AttemptId(message.request_id, message.number)


def trace_to_pb(value: TraceContext | None) -> pb.TraceContext | None:
    if value is None:
        return None
    return pb.TraceContext(
        trace_id=value.trace_id, span_id=value.span_id, sampled=value.sampled, state=value.state
    )


def trace_from_pb(message: Any) -> TraceContext | None:
    """Of a message that may have one."""
    if not message.HasField("trace"):
        return None
    trace = message.trace
    return TraceContext(trace.trace_id, trace.span_id, trace.sampled, trace.state)


def sampling_to_pb(value: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=value.temperature,
        top_p=value.top_p,
        top_k=value.top_k,
        min_p=value.min_p,
        presence_penalty=value.presence_penalty,
        frequency_penalty=value.frequency_penalty,
        repetition_penalty=value.repetition_penalty,
        logit_bias=[pb.LogitBias(token_id=token, bias=bias) for token, bias in value.logit_bias],
        seed=value.seed,
        max_tokens=value.max_tokens,
        min_tokens=value.min_tokens,
        ignore_eos=value.ignore_eos,
        stop_token_ids=value.stop_token_ids,
        logprobs=value.logprobs,
    )


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=tuple((item.token_id, item.bias) for item in message.logit_bias),
        seed=message.seed,
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        ignore_eos=message.ignore_eos,
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
    )


def task_to_pb(value: GenerationTask) -> pb.GenerationTask:
    return pb.GenerationTask(
        attempt=attempt_to_pb(value.attempt),
        prompt=value.prompt,
        sampling=sampling_to_pb(value.sampling),
        output=value.output,
        priority=value.priority,
        timeout_s=value.timeout_s,
        cache_salt=value.cache_salt,
        cache_pin_s=value.cache_pin_s,
        slack_s=value.slack_s,
        trace=trace_to_pb(value.trace),
    )


def task_from_pb(message: pb.GenerationTask) -> GenerationTask:
    return GenerationTask(
        attempt=attempt_from_pb(message.attempt),
        prompt=tuple(message.prompt),
        sampling=sampling_from_pb(message.sampling),
        output=tuple(message.output),
        priority=message.priority,
        timeout_s=message.timeout_s if message.HasField("timeout_s") else None,
        cache_salt=message.cache_salt,
        cache_pin_s=message.cache_pin_s if message.HasField("cache_pin_s") else None,
        slack_s=message.slack_s,
        trace=trace_from_pb(message),
    )


def token_to_pb(value: SampledToken) -> pb.SampledToken:
    return pb.SampledToken(
        token_id=value.token_id, index=value.index, logprob=_logprob_to_pb(value.logprob)
    )


def token_from_pb(message: pb.SampledToken) -> SampledToken:
    logprob = _logprob_from_pb(message.logprob) if message.HasField("logprob") else None
    return SampledToken(message.token_id, message.index, logprob)


def tokens_from_pb(messages: Iterable[pb.SampledToken]) -> tuple[SampledToken, ...]:
    return tuple(token_from_pb(message) for message in messages)


def _logprob_to_pb(value: TokenLogprob | None) -> pb.TokenLogprob | None:
    if value is None:
        return None
    return pb.TokenLogprob(
        logprob=value.logprob,
        top_ids=[token for token, _ in value.top],
        top_logprobs=[logprob for _, logprob in value.top],
    )


def _logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple(zip(message.top_ids, message.top_logprobs, strict=True))
    return TokenLogprob(message.logprob, top)


def error_to_pb(value: WireError) -> pb.WireError:
    return pb.WireError(
        code=value.code,
        message=value.message,
        retryable=value.retryable,
        client_fault=value.client_fault,
    )


def error_from_pb(message: pb.WireError) -> WireError:
    return WireError(message.code, message.message, message.retryable, message.client_fault)
