"""A request's timeline as the spans of a distributed trace.

    chat demo                          the request; its parent is the client's span
    |- read, tokenize, route, deliver  stages of its TTFT
    |- attempt 0                       its workers' spans below it
    |  |- dispatch, return             stages between the processes
    |  |- queue, fetch, prefill, handoff         of the prefill worker
    |  '- attach, reserve, transfer, decode ...  of the decode worker
    '- attempt 1                       with a link to the attempt that failed

Names follow OpenTelemetry's conventions for generative AI where they have one. Nothing here is what
a client or the model wrote, nor an error's text, which may quote it: only codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from baton.types.request import AttemptId, Span
from baton.types.trace import TraceContext, span_id_of
from conductor.attribution import DELIVER, DISPATCH, READ, RETURN, ROUTE, TOKENIZE, clock_shift
from conductor.trace import AttemptRecord, Timeline

Value = str | int | float | bool | tuple[str, ...]

CONDUCTOR, PREFILL, DECODE = "baton-conductor", "baton-prefill", "baton-decode"  # services
_UNTIL_TOKEN = ("queue", "fetch", "prefill")


class Kind(StrEnum):
    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """Times in Unix seconds. `parent_id` is empty at the root of a trace; `error` is a code;
    `process` is the worker's name, or empty for the conductor itself."""

    name: str
    span_id: str
    parent_id: str
    start_s: float
    end_s: float
    attributes: Mapping[str, Value]
    kind: Kind = Kind.INTERNAL
    service: str = CONDUCTOR
    process: str = ""
    error: str = ""
    follows: str = ""  # the span id of the attempt before
    events: tuple[tuple[str, float], ...] = ()


def span_tree(timeline: Timeline) -> tuple[TreeSpan, ...]:
    """Of a request that has ended."""
    ended_s = timeline.ended_s or timeline.received_s
    root = timeline.tracing.context
    stages = {stage.name: stage for stage in timeline.ttft_stages(ended_s)}
    spans = [_root(timeline, ended_s)]
    for name in (READ, TOKENIZE, ROUTE, DELIVER):
        if (stage := stages.get(name)) is not None:
            own = Span(name, stage.start_s, stage.end_s)
            spans.append(_part(own, root))
    before = ""
    for attempt, record in timeline.attempts.items():
        context = timeline.tracing.of_attempt(attempt)
        attempt_span = _attempt(attempt, record, context, before, ended_s)
        spans.append(replace(attempt_span, parent_id=root.span_id))
        if attempt == timeline.first_by:
            between = [stages[name] for name in (DISPATCH, RETURN) if name in stages]
            spans += [_part(Span(s.name, s.start_s, s.end_s), context) for s in between]
        spans += _of_workers(timeline, attempt, record, context)
        before = context.span_id
    return tuple(spans)


def _root(timeline: Timeline, ended_s: float) -> TreeSpan:
    tracing, failed = timeline.tracing, timeline.outcome != "ok"
    token = () if timeline.passed_s is None else (("first_token", timeline.passed_s),)
    return TreeSpan(
        f"{timeline.operation} {timeline.model}",
        tracing.context.span_id,
        tracing.caller.span_id if tracing.caller is not None else "",
        timeline.received_s,
        ended_s,
        _gen_ai(timeline) | ({"error.type": timeline.outcome} if failed else {}),
        Kind.SERVER,
        error=timeline.outcome if failed else "",
        events=token,
    )


def _gen_ai(timeline: Timeline) -> dict[str, Value]:
    asked = timeline.asked
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": timeline.operation,
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": timeline.model,
        "gen_ai.request.max_tokens": asked.max_tokens,
        "gen_ai.request.temperature": asked.temperature,
        "gen_ai.request.top_p": asked.top_p,
        "gen_ai.request.choice.count": asked.answers,
        "gen_ai.response.id": timeline.request_id,
        "gen_ai.response.model": timeline.model,
        "gen_ai.usage.input_tokens": timeline.prompt_tokens,
        "gen_ai.usage.output_tokens": timeline.output_tokens,
        "gen_ai.usage.cache_read.input_tokens": timeline.cached_tokens,
        "baton.attempts": len(timeline.attempts),
    }
    if timeline.tenant:
        attributes["baton.tenant"] = timeline.tenant
    if timeline.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = tuple(timeline.finish_reasons)
    if timeline.passed_s is not None:
        ttft_s = timeline.passed_s - timeline.received_s
        attributes["gen_ai.response.time_to_first_chunk"] = ttft_s
    return attributes


def _attempt(
    attempt: AttemptId, record: AttemptRecord, own: TraceContext, before: str, ended_s: float
) -> TreeSpan:
    failed = record.ended not in (None, "complete")
    code = (record.ended or "").partition(":")[0] if failed else ""
    attributes: dict[str, Value] = {
        "baton.attempt": str(attempt),
        "baton.resumed_at": record.resumed_at,
        "baton.decode.worker": record.adopted_at,
        "baton.adopted": record.decision is None,
    }
    if (decision := record.decision) is not None:
        attributes["baton.decode.worker"] = decision.decode.info.name
        attributes["baton.route.reason"] = decision.reason
        attributes["baton.route.predicted_ttft_s"] = decision.ttft_s
        attributes["baton.fetch.blocks"] = sum(part.num_blocks for part in decision.fetch_plan)
        if decision.prefill is not None:
            attributes["baton.prefill.worker"] = decision.prefill.info.name
    return TreeSpan(
        f"attempt {attempt.number}",
        own.span_id,
        "",
        record.sent_s,
        record.ended_s if record.ended_s is not None else ended_s,
        attributes | ({"error.type": code} if code else {}),
        Kind.CLIENT,
        error=code,
        follows=before,
    )


def _of_workers(
    timeline: Timeline, attempt: AttemptId, record: AttemptRecord, context: TraceContext
) -> Iterator[TreeSpan]:
    """By worker, its clock moved so that nothing is before the attempt was sent."""
    told: dict[str, list[Span]] = {}
    for source, name, span in timeline.spans:
        if name == str(attempt):
            told.setdefault(source, []).append(span)
    for worker, spans in told.items():
        shift_s = _shift(worker, spans, record)
        service = PREFILL if worker == _prefill_of(record) else DECODE
        for span in spans:
            moved = Span(span.name, span.start_s + shift_s, span.end_s + shift_s)
            attributes = {f"baton.{name}": count for name, count in span.counts}
            part = _part(moved, context, attributes, worker)
            yield replace(part, service=service, process=worker)


def _shift(worker: str, spans: Sequence[Span], record: AttemptRecord) -> float:
    if worker == record.computes and record.heard_s is not None:
        until_token = [span for span in spans if span.name in _UNTIL_TOKEN]
        return clock_shift(until_token, record.sent_s, record.heard_s)
    return clock_shift(spans, record.sent_s, record.ended_s or float("inf"))


def _prefill_of(record: AttemptRecord) -> str:
    decision = record.decision
    return decision.prefill.info.name if decision is not None and decision.prefill else ""


def _part(
    span: Span,
    parent: TraceContext,
    attributes: Mapping[str, Value] | None = None,
    worker: str = "",
) -> TreeSpan:
    name = f"{parent.trace_id} {parent.span_id} {worker} {span.name}"
    return TreeSpan(
        span.name,
        span_id_of(name),
        parent.span_id,
        span.start_s,
        span.end_s,
        attributes if attributes is not None else {},
    )
