"""Codec of what a conductor tells a worker; `codec_report` has the other direction."""

from __future__ import annotations

from typing import assert_never

from baton.errors import InternalError
from baton.rpc.codec_fleet import peer_from_pb, peer_to_pb
from baton.rpc.codec_request import attempt_from_pb, attempt_to_pb, task_from_pb, task_to_pb
from baton.types.link import Cancel, ConductorMessage, Drain, StartDecode, StartPrefill
from baton.v1 import worker_pb2 as pb


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


def unknown_kind(sender: str, stream: str) -> InternalError:
    """The error for a message whose kind is unset or newer than this version."""
    return InternalError(
        f"{sender} sent a {stream} message of a kind that this version does not know; "
        "run the same version of baton everywhere"
    )
