"""What a store counts, and how conductors are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from baton.types.figures import StoreFigures, TierFigures, TierState
from baton.types.kv_events import Tier
from kvstore.disk_options import DiskState
from kvstore.disk_tier import DiskTier
from kvstore.memory_tier import MemoryTier
from kvstore.pins import Pins
from kvstore.sealing import Sealer

_STATES = {
    DiskState.ON: TierState.ON,
    DiskState.PAUSED: TierState.PAUSED,
    DiskState.OFF: TierState.OFF,
}


class Refusal(StrEnum):
    """Why a block that was offered is not taken."""

    PRESENT = "present"  # in CPU memory already
    BUSY = "busy"  # being put, or on its way up from NVMe
    PRESSURE = "pressure"  # every slot is being filled or read, or too much waits to be hashed


@dataclass(slots=True)
class StoreStats:
    """Blocks, counted since the start."""

    stored: int = 0
    refused: dict[Refusal, int] = field(default_factory=lambda: dict.fromkeys(Refusal, 0))
    aborted: int = 0
    hits: dict[Tier, int] = field(default_factory=lambda: {Tier.CPU: 0, Tier.NVME: 0})
    demoted: int = 0  # written to NVMe, then evicted
    evicted: int = 0  # on NVMe already, or there is no NVMe tier
    lost: int = 0  # evicted under pressure, before NVMe had them


def store_figures(
    stats: StoreStats, memory: MemoryTier, disk: DiskTier | None, pins: Pins, sealer: Sealer
) -> StoreFigures:
    """A copy of what has been counted, and how full the tiers are."""
    hits = stats.hits
    tiers = [TierFigures(Tier.CPU, TierState.ON, len(memory), memory.num_slots, hits[Tier.CPU])]
    if disk is not None:
        tiers.append(_disk_figures(disk, hits[Tier.NVME]))
    return StoreFigures(
        tiers=tuple(tiers),
        stored=stats.stored,
        present=stats.refused[Refusal.PRESENT],
        busy=stats.refused[Refusal.BUSY],
        pressure=stats.refused[Refusal.PRESSURE],
        aborted=stats.aborted,
        demoted=stats.demoted,
        evicted=stats.evicted,
        lost=stats.lost,
        bad_blocks=sealer.damaged + (0 if disk is None else disk.stats.damaged),
        pinned=len(pins),
        pins_refused=pins.refused,
        disk_errors=0 if disk is None else disk.stats.errors,
    )


def _disk_figures(disk: DiskTier, hits: int) -> TierFigures:
    state = disk.state
    why = "" if state is DiskState.ON else disk.why
    return TierFigures(Tier.NVME, _STATES[state], len(disk), disk.capacity, hits, why)
