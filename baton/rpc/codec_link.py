"""Codec of what a conductor tells a worker; `codec_report` has the other direction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import assert_never

from baton.errors import InternalError
from baton.rpc.codec_fleet import peer_from_pb, peer_to_pb, role_from_pb, role_to_pb
from baton.rpc.codec_kv import tier_from_pb, tier_to_pb
from baton.rpc.codec_request import attempt_from_pb, attempt_to_pb, task_from_pb, task_to_pb
from baton.types.link import (
    Adopt,
    Cancel,
    ConductorMessage,
    Drain,
    FetchPart,
    Resync,
    SetRole,
    StartDecode,
    StartPrefill,
)
from baton.v1 import worker_pb2 as pb


def conductor_to_pb(value: ConductorMessage) -> pb.ConductorMessage:
    match value:
        case StartPrefill(task, fetch):
            parts = [_part_to_pb(part) for part in fetch]
            return pb.ConductorMessage(
                start_prefill=pb.StartPrefill(task=task_to_pb(task), fetch=parts)
            )
        case StartDecode(task, prefill, fetch):
            peer = None if prefill is None else peer_to_pb(prefill)
            parts = [_part_to_pb(part) for part in fetch]
            start = pb.StartDecode(task=task_to_pb(task), prefill=peer, fetch=parts)
            return pb.ConductorMessage(start_decode=start)
        case Adopt(attempt):
            return pb.ConductorMessage(adopt=pb.Adopt(attempt=attempt_to_pb(attempt)))
        case Cancel(attempt, reason):
            cancel = pb.Cancel(attempt=attempt_to_pb(attempt), reason=reason)
            return pb.ConductorMessage(cancel=cancel)
        case Drain():
            return pb.ConductorMessage(drain=pb.Drain())
        case Resync():
            return pb.ConductorMessage(resync=pb.Resync())
        case SetRole(role):
            return pb.ConductorMessage(set_role=pb.SetRole(role=role_to_pb(role)))
        case _:
            assert_never(value)


def conductor_from_pb(message: pb.ConductorMessage) -> ConductorMessage:
    match message.WhichOneof("kind"):
        case "start_prefill":
            begin = message.start_prefill
            return StartPrefill(task_from_pb(begin.task), _parts_from_pb(begin.fetch))
        case "start_decode":
            start = message.start_decode
            peer = peer_from_pb(start.prefill) if start.HasField("prefill") else None
            return StartDecode(task_from_pb(start.task), peer, _parts_from_pb(start.fetch))
        case "adopt":
            return Adopt(attempt_from_pb(message.adopt.attempt))
        case "cancel":
            return Cancel(attempt_from_pb(message.cancel.attempt), message.cancel.reason)
        case "drain":
            return Drain()
        case "resync":
            return Resync()
        case "set_role":
            return SetRole(role_from_pb(message.set_role.role))
        case _:
            raise unknown_kind("a conductor", "link")


def _part_to_pb(value: FetchPart) -> pb.FetchPart:
    return pb.FetchPart(
        source=peer_to_pb(value.source),
        first_block=value.first_block,
        num_blocks=value.num_blocks,
        tier=tier_to_pb(value.tier),
    )


def _parts_from_pb(messages: Iterable[pb.FetchPart]) -> tuple[FetchPart, ...]:
    return tuple(
        FetchPart(
            peer_from_pb(message.source),
            message.first_block,
            message.num_blocks,
            tier_from_pb(message.tier),
        )
        for message in messages
    )


def unknown_kind(sender: str, stream: str) -> InternalError:
    """The error for a message whose kind is unset or newer than this version."""
    return InternalError(
        f"{sender} sent a {stream} message of a kind that this version does not know; "
        "run the same version of baton everywhere"
    )
