"""Codec of the link between conductor and worker: ConductorMessage and WorkerMessage."""

from __future__ import annotations

from typing import assert_never

from baton.errors import InternalError
from baton.rpc.codec_fleet import load_from_pb, load_to_pb, peer_from_pb, peer_to_pb
from baton.rpc.codec_request import (
    attempt_from_pb,
    attempt_to_pb,
    error_from_pb,
    error_to_pb,
    task_from_pb,
    task_to_pb,
    token_to_pb,
    tokens_from_pb,
)
from baton.types.link import (
    Cancel,
    ConductorMessage,
    Drain,
    StartDecode,
    StartPrefill,
    StepReport,
    WorkerMessage,
)
from baton.types.request import AttemptOutput, Finish, FinishReason, Span
from baton.v1 import worker_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
    FinishReason.HANDED_OFF: pb.FINISH_REASON_HANDED_OFF,
}
_REASONS_BACK = {number: reason for reason, number in _REASONS.items()}


def conductor_to_pb(value: ConductorMessage) -> pb.ConductorMessage:
    match value:
        case StartPrefill(task):
            return pb.ConductorMessage(start_prefill=pb.StartPrefill(task=task_to_pb(task)))
        case StartDecode(task, prefill):
            peer = None if prefill is None else peer_to_pb(prefill)
            start = pb.StartDecode(task=task_to_pb(task), prefill=peer)
            return pb.ConductorMessage(start_decode=start)
        case Cancel(attempt, reason):
            cancel = pb.Cancel(attempt=attempt_to_pb(attempt), reason=reason)
            return pb.ConductorMessage(cancel=cancel)
        case Drain():
            return pb.ConductorMessage(drain=pb.Drain())
        case _:
            assert_never(value)


def conductor_from_pb(message: pb.ConductorMessage) -> ConductorMessage:
    match message.WhichOneof("kind"):
        case "start_prefill":
            return StartPrefill(task_from_pb(message.start_prefill.task))
        case "start_decode":
            start = message.start_decode
            peer = peer_from_pb(start.prefill) if start.HasField("prefill") else None
            return StartDecode(task_from_pb(start.task), peer)
        case "cancel":
            return Cancel(attempt_from_pb(message.cancel.attempt), message.cancel.reason)
        case "drain":
            return Drain()
        case _:
            raise unknown_kind("a conductor", "link")


def worker_to_pb(value: WorkerMessage) -> pb.WorkerMessage:
    report = pb.StepReport(
        outputs=[_output_to_pb(output) for output in value.outputs], load=load_to_pb(value.load)
    )
    return pb.WorkerMessage(step_report=report)


def worker_from_pb(message: pb.WorkerMessage) -> WorkerMessage:
    if message.WhichOneof("kind") != "step_report":
        raise unknown_kind("a worker", "link")
    report = message.step_report
    outputs = tuple(_output_from_pb(output) for output in report.outputs)
    return StepReport(outputs, load_from_pb(report.load))


def unknown_kind(sender: str, stream: str) -> InternalError:
    """The error for a message whose kind is unset or newer than this version."""
    return InternalError(
        f"{sender} sent a {stream} message of a kind that this version does not know; "
        "run the same version of baton everywhere"
    )


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
        spans=[
            pb.Span(name=span.name, start_s=span.start_s, end_s=span.end_s) for span in value.spans
        ],
    )


def _finish_from_pb(message: pb.Finish) -> Finish:
    if message.reason not in _REASONS_BACK:
        raise unknown_kind("a worker", "finish")
    return Finish(
        _REASONS_BACK[message.reason],
        error_from_pb(message.error) if message.HasField("error") else None,
        message.cached_tokens,
        tuple(Span(span.name, span.start_s, span.end_s) for span in message.spans),
    )
