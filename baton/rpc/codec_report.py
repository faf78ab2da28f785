"""Codec of what a worker tells a conductor. It has a state per stream: see StepReport in the proto.

An attempt's outputs keep their order. Outputs of different attempts may change places: plain ones
(one token, nothing else to say) travel in columns, before the others.
"""

from __future__ import annotations

from typing import assert_never

from baton.errors import InternalError
from baton.rpc.codec_fleet import load_from_pb, load_to_pb
from baton.rpc.codec_kv import events_from_pb, events_to_pb, snapshot_from_pb, snapshot_to_pb
from baton.rpc.codec_link import unknown_kind
from baton.rpc.codec_request import (
    attempt_from_pb,
    attempt_to_pb,
    error_from_pb,
    error_to_pb,
    token_to_pb,
    tokens_from_pb,
)
from baton.types.kv_events import KvEvents, KvSnapshot
from baton.types.link import StepReport, WorkerMessage
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    SampledToken,
    Span,
)
from baton.v1 import common_pb2
from baton.v1 import worker_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
    FinishReason.HANDED_OFF: pb.FINISH_REASON_HANDED_OFF,
}
_REASONS_BACK = {number: reason for reason, number in _REASONS.items()}


class ReportEncoder:
    """Of one stream, in the order in which its messages are sent."""

    def __init__(self) -> None:
        self._numbers: dict[AttemptId, int] = {}
        self._next = 0

    def encode(self, value: WorkerMessage) -> pb.WorkerMessage:
        match value:
            case StepReport():
                return pb.WorkerMessage(step_report=self._report(value))
            case KvEvents():
                return pb.WorkerMessage(kv_events=events_to_pb(value))
            case KvSnapshot():
                return pb.WorkerMessage(kv_snapshot=snapshot_to_pb(value))
            case _:
                assert_never(value)

    def _report(self, value: StepReport) -> pb.StepReport:
        named: list[common_pb2.AttemptId] = []
        numbers: list[int] = []
        token_ids: list[int] = []
        indices: list[int] = []
        others: list[pb.AttemptOutput] = []
        late: set[AttemptId] = set()  # with an output among `others`: nothing may overtake it
        for output in value.outputs:
            attempt, tokens = output.attempt, output.tokens
            plain = output.finish is None and len(tokens) == 1 and tokens[0].logprob is None
            if not plain or attempt in late:
                late.add(attempt)
                others.append(_output_to_pb(output))
                if output.finish is not None:
                    self._numbers.pop(attempt, None)
                continue
            number = self._numbers.get(attempt)
            if number is None:
                number = self._name(attempt)
                named.append(attempt_to_pb(attempt))
            numbers.append(number)
            token_ids.append(tokens[0].token_id)
            indices.append(tokens[0].index)
        return pb.StepReport(
            outputs=others,
            load=load_to_pb(value.load),
            named=named,
            numbers=numbers,
            token_ids=token_ids,
            indices=indices,
        )

    def _name(self, attempt: AttemptId) -> int:
        number = self._numbers[attempt] = self._next
        self._next += 1
        return number


class ReportDecoder:
    """Of one stream, in the order in which its messages arrive."""

    def __init__(self) -> None:
        self._attempts: dict[int, AttemptId] = {}
        self._numbers: dict[AttemptId, int] = {}
        self._next = 0

    def decode(self, message: pb.WorkerMessage) -> WorkerMessage:
        """Raises InternalError for what no encoder of this version makes."""
        match message.WhichOneof("kind"):
            case "step_report":
                return self._report(message.step_report)
            case "kv_events":
                return events_from_pb(message.kv_events)
            case "kv_snapshot":
                return snapshot_from_pb(message.kv_snapshot)
            case _:
                raise unknown_kind("a worker", "link")

    def _report(self, report: pb.StepReport) -> StepReport:
        for named in report.named:
            self._name(attempt_from_pb(named))
        attempts = self._attempts
        try:
            plain = [
                AttemptOutput(attempts[number], (SampledToken(token_id, index),))
                for number, token_id, index in zip(
                    report.numbers, report.token_ids, report.indices, strict=True
                )
            ]
        except (KeyError, ValueError) as error:
            raise InternalError(f"a worker sent a report that makes no sense: {error}") from error
        others = [_output_from_pb(output) for output in report.outputs]
        for output in others:
            if output.finish is not None and output.attempt in self._numbers:
                del attempts[self._numbers.pop(output.attempt)]
        return StepReport((*plain, *others), load_from_pb(report.load))

    def _name(self, attempt: AttemptId) -> None:
        self._attempts[self._next] = attempt
        self._numbers[attempt] = self._next
        self._next += 1


def _output_to_pb(value: AttemptOutput) -> pb.AttemptOutput:
    return pb.AttemptOutput(
        attempt=attempt_to_pb(value.attempt),
        tokens=[token_to_pb(token) for token in value.tokens],
        finish=None if value.finish is None else _finish_to_pb(value.finish),
    )


def _output_from_pb(message: pb.AttemptOutput) -> AttemptOutput:
    return AttemptOutput(
        attempt_from_pb(message.attempt),
        tokens_from_pb(message.tokens),
        _finish_from_pb(message.finish) if message.HasField("finish") else None,
    )


def _finish_to_pb(value: Finish) -> pb.Finish:
    return pb.Finish(
        reason=_REASONS[value.reason],
        error=None if value.error is None else error_to_pb(value.error),
        cached_tokens=value.cached_tokens,
        spans=[_span_to_pb(span) for span in value.spans],
    )


def _span_to_pb(value: Span) -> pb.Span:
    counts = [pb.SpanCount(name=name, value=count) for name, count in value.counts]
    return pb.Span(name=value.name, start_s=value.start_s, end_s=value.end_s, counts=counts)


def _span_from_pb(message: pb.Span) -> Span:
    counts = tuple((count.name, count.value) for count in message.counts)
    return Span(message.name, message.start_s, message.end_s, counts)


def _finish_from_pb(message: pb.Finish) -> Finish:
    if message.reason not in _REASONS_BACK:
        raise unknown_kind("a worker", "finish")
    return Finish(
        _REASONS_BACK[message.reason],
        error_from_pb(message.error) if message.HasField("error") else None,
        message.cached_tokens,
        tuple(_span_from_pb(span) for span in message.spans),
    )
