"""Codec of what baton/types/figures.py defines."""

from __future__ import annotations

from baton.errors import InternalError
from baton.rpc.codec_kv import tier_from_pb, tier_to_pb
from baton.types.figures import OfferCounts, StoreFigures, TierFigures, TierState
from baton.v1 import common_pb2 as pb

_STATES = {
    TierState.ON: pb.TIER_STATE_ON,
    TierState.PAUSED: pb.TIER_STATE_PAUSED,
    TierState.OFF: pb.TIER_STATE_OFF,
}
_STATES_BACK = {number: state for state, number in _STATES.items()}


def offers_to_pb(value: OfferCounts) -> pb.OfferCounts:
    return pb.OfferCounts(
        read=value.read, dropped=value.dropped, gone=value.gone, failed=value.failed
    )


def offers_from_pb(message: pb.OfferCounts) -> OfferCounts:
    return OfferCounts(message.read, message.dropped, message.gone, message.failed)


def store_to_pb(value: StoreFigures) -> pb.StoreFigures:
    return pb.StoreFigures(
        tiers=[_tier_to_pb(tier) for tier in value.tiers],
        stored=value.stored,
        present=value.present,
        busy=value.busy,
        pressure=value.pressure,
        aborted=value.aborted,
        demoted=value.demoted,
        evicted=value.evicted,
        lost=value.lost,
        bad_blocks=value.bad_blocks,
        disk_errors=value.disk_errors,
        pinned=value.pinned,
        pins_refused=value.pins_refused,
    )


def store_from_pb(message: pb.StoreFigures) -> StoreFigures:
    return StoreFigures(
        tiers=tuple(_tier_from_pb(tier) for tier in message.tiers),
        stored=message.stored,
        present=message.present,
        busy=message.busy,
        pressure=message.pressure,
        aborted=message.aborted,
        demoted=message.demoted,
        evicted=message.evicted,
        lost=message.lost,
        bad_blocks=message.bad_blocks,
        disk_errors=message.disk_errors,
        pinned=message.pinned,
        pins_refused=message.pins_refused,
    )


def _tier_to_pb(value: TierFigures) -> pb.TierFigures:
    return pb.TierFigures(
        tier=tier_to_pb(value.tier),
        state=_STATES[value.state],
        blocks=value.blocks,
        capacity=value.capacity,
        hits=value.hits,
        why=value.why,
    )


def _tier_from_pb(message: pb.TierFigures) -> TierFigures:
    if message.state not in _STATES_BACK:
        raise InternalError(
            f"a store sent tier state {message.state}, which this version does not know; "
            "run the same version of baton everywhere"
        )
    return TierFigures(
        tier=tier_from_pb(message.tier),
        state=_STATES_BACK[message.state],
        blocks=message.blocks,
        capacity=message.capacity,
        hits=message.hits,
        why=message.why,
    )
