"""Codec of what baton/types/kv_events.py defines."""

from __future__ import annotations

from baton.errors import InternalError
from baton.hashing import KEY_BYTES
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.v1 import common_pb2 as common
from baton.v1 import worker_pb2 as pb

_TIERS = {Tier.GPU: common.TIER_GPU, Tier.CPU: common.TIER_CPU, Tier.NVME: common.TIER_NVME}
_TIERS_BACK = {number: tier for tier, number in _TIERS.items()}


def tier_to_pb(value: Tier) -> common.Tier:
    return _TIERS[value]


def tier_from_pb(number: common.Tier) -> Tier:
    try:
        return _TIERS_BACK[number]
    except KeyError:
        raise InternalError(
            f"a peer sent tier {number}, which this version does not know; "
            "run the same version of baton everywhere"
        ) from None


def events_to_pb(value: KvEvents) -> pb.KvEvents:
    return pb.KvEvents(
        number=value.number,
        tier=_TIERS[value.tier],
        added=value.added,
        removed=value.removed,
    )


def events_from_pb(message: pb.KvEvents) -> KvEvents:
    tier = tier_from_pb(message.tier)
    return KvEvents(message.number, tier, _whole(message.added), _whole(message.removed))


def snapshot_to_pb(value: KvSnapshot) -> pb.KvSnapshot:
    return pb.KvSnapshot(
        number=value.number,
        tier=_TIERS[value.tier],
        keys=value.keys,
        first=value.first,
        last=value.last,
    )


def snapshot_from_pb(message: pb.KvSnapshot) -> KvSnapshot:
    tier, keys = tier_from_pb(message.tier), _whole(message.keys)
    return KvSnapshot(message.number, tier, keys, message.first, message.last)


def _whole(keys: bytes) -> bytes:
    """Refused here, where that ends the stream of whoever sent it, and nothing else."""
    if len(keys) % KEY_BYTES:
        raise InternalError(f"a peer sent {len(keys)} bytes of keys, which have {KEY_BYTES} each")
    return keys
