"""Codec of the handoff between decode and prefill worker: DecodeMessage and PrefillMessage."""

from __future__ import annotations

from typing import assert_never

from baton.rpc.codec_fleet import layout_from_pb, layout_to_pb
from baton.rpc.codec_link import unknown_kind
from baton.rpc.codec_request import (
    attempt_from_pb,
    attempt_to_pb,
    error_from_pb,
    error_to_pb,
    token_from_pb,
    token_to_pb,
    trace_from_pb,
    trace_to_pb,
)
from baton.types.handoff import (
    Abort,
    Attach,
    DecodeMessage,
    Expired,
    Hello,
    Prefilled,
    PrefillMessage,
    Ranges,
    Refused,
    Release,
    Released,
    Renew,
)
from baton.v1 import handoff_pb2 as pb


def decode_to_pb(value: DecodeMessage) -> pb.DecodeMessage:
    match value:
        case Hello():
            return pb.DecodeMessage(hello=_hello_to_pb(value))
        case Attach(attempt, trace):
            attach = pb.Attach(attempt=attempt_to_pb(attempt), trace=trace_to_pb(trace))
            return pb.DecodeMessage(attach=attach)
        case Renew(attempts):
            renew = pb.Renew(attempts=[attempt_to_pb(attempt) for attempt in attempts])
            return pb.DecodeMessage(renew=renew)
        case Release(attempt, digest):
            release = pb.Release(attempt=attempt_to_pb(attempt), digest=digest)
            return pb.DecodeMessage(release=release)
        case Abort(attempt, reason):
            abort = pb.Abort(attempt=attempt_to_pb(attempt), reason=reason)
            return pb.DecodeMessage(abort=abort)
        case _:
            assert_never(value)


def decode_from_pb(message: pb.DecodeMessage) -> DecodeMessage:
    match message.WhichOneof("kind"):
        case "hello":
            return _hello_from_pb(message.hello)
        case "attach":
            attach = message.attach
            return Attach(attempt_from_pb(attach.attempt), trace_from_pb(attach))
        case "renew":
            return Renew(tuple(attempt_from_pb(attempt) for attempt in message.renew.attempts))
        case "release":
            return Release(attempt_from_pb(message.release.attempt), message.release.digest)
        case "abort":
            return Abort(attempt_from_pb(message.abort.attempt), message.abort.reason)
        case _:
            raise unknown_kind("a decode worker", "handoff")


def prefill_to_pb(value: PrefillMessage) -> pb.PrefillMessage:
    match value:
        case Hello():
            return pb.PrefillMessage(hello=_hello_to_pb(value))
        case Ranges():
            return pb.PrefillMessage(ranges=_ranges_to_pb(value))
        case Prefilled():
            return pb.PrefillMessage(prefilled=_prefilled_to_pb(value))
        case Released(attempt):
            return pb.PrefillMessage(released=pb.Released(attempt=attempt_to_pb(attempt)))
        case Expired(attempt):
            return pb.PrefillMessage(expired=pb.Expired(attempt=attempt_to_pb(attempt)))
        case Refused(attempt, error):
            target = None if attempt is None else attempt_to_pb(attempt)
            return pb.PrefillMessage(refused=pb.Refused(attempt=target, error=error_to_pb(error)))
        case _:
            assert_never(value)


def prefill_from_pb(message: pb.PrefillMessage) -> PrefillMessage:
    match message.WhichOneof("kind"):
        case "hello":
            return _hello_from_pb(message.hello)
        case "ranges":
            return _ranges_from_pb(message.ranges)
        case "prefilled":
            return _prefilled_from_pb(message.prefilled)
        case "released":
            return Released(attempt_from_pb(message.released.attempt))
        case "expired":
            return Expired(attempt_from_pb(message.expired.attempt))
        case "refused":
            refused = message.refused
            target = attempt_from_pb(refused.attempt) if refused.HasField("attempt") else None
            return Refused(target, error_from_pb(refused.error))
        case _:
            raise unknown_kind("a prefill worker", "handoff")


def _hello_to_pb(value: Hello) -> pb.Hello:
    return pb.Hello(
        worker=value.worker,
        incarnation=value.incarnation,
        layout=layout_to_pb(value.layout),
        transport=value.transport,
        endpoint=value.endpoint,
        lease_ttl_s=value.lease_ttl_s,
        expected_incarnation=value.expected_incarnation,
    )


def _hello_from_pb(message: pb.Hello) -> Hello:
    return Hello(
        worker=message.worker,
        incarnation=message.incarnation,
        layout=layout_from_pb(message.layout),
        transport=message.transport,
        endpoint=message.endpoint,
        lease_ttl_s=message.lease_ttl_s,
        expected_incarnation=message.expected_incarnation,
    )


def _ranges_to_pb(value: Ranges) -> pb.Ranges:
    return pb.Ranges(
        attempt=attempt_to_pb(value.attempt),
        first_block=value.first_block,
        blocks=value.blocks,
        layer_begin=value.layer_begin,
        layer_end=value.layer_end,
        digests=value.digests,
    )


def _ranges_from_pb(message: pb.Ranges) -> Ranges:
    return Ranges(
        attempt=attempt_from_pb(message.attempt),
        first_block=message.first_block,
        blocks=tuple(message.blocks),
        layer_begin=message.layer_begin,
        layer_end=message.layer_end,
        digests=tuple(message.digests),
    )


def _prefilled_to_pb(value: Prefilled) -> pb.Prefilled:
    return pb.Prefilled(
        attempt=attempt_to_pb(value.attempt),
        first=token_to_pb(value.first),
        num_blocks=value.num_blocks,
        cached_tokens=value.cached_tokens,
    )


def _prefilled_from_pb(message: pb.Prefilled) -> Prefilled:
    return Prefilled(
        attempt=attempt_from_pb(message.attempt),
        first=token_from_pb(message.first),
        num_blocks=message.num_blocks,
        cached_tokens=message.cached_tokens,
    )
