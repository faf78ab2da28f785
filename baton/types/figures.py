"""What stores and workers count, as they tell it to conductors: for metrics and `baton status`.

Counts are totals since the process was started. They travel as they are, not as differences, so
that a report which is lost costs nothing; a process that was started again begins at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from baton.types.kv_events import Tier


class TierState(StrEnum):
    ON = "on"
    PAUSED = "paused"  # takes no blocks for a while, and gives those that it has
    OFF = "off"  # holds nothing until the store is started again


@dataclass(frozen=True, slots=True)
class TierFigures:
    """One tier of a store. `blocks` and `capacity` are blocks, now."""

    tier: Tier
    state: TierState
    blocks: int
    capacity: int
    hits: int = 0  # blocks that were found here when they were asked for
    why: str = ""  # it is not ON


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """Of a store. All are blocks, except `disk_errors`."""

    tiers: tuple[TierFigures, ...] = ()  # fastest first
    # Every put that was begun ends as one of these.
    stored: int = 0
    present: int = 0  # refused: in memory already
    busy: int = 0  # refused: being put, or on its way up from NVMe
    pressure: int = 0  # refused: every slot was in use, or too much waited to be hashed
    aborted: int = 0  # it did not come whole
    # Every block that left the CPU tier went as one of these.
    demoted: int = 0  # written to NVMe for it
    evicted: int = 0  # on NVMe already, or there is no NVMe tier
    lost: int = 0  # NVMe should have had it, and was not fast enough
    pinned: int = 0  # now: they stay in the CPU tier until a time that somebody asked for
    pins_refused: int = 0  # too many were pinned, or the block was not stored
    bad_blocks: int = 0  # did not verify when they were read: forgotten
    disk_errors: int = 0  # calls to the disk that failed


@dataclass(frozen=True, slots=True)
class OfferCounts:
    """Of a worker's offers to its store. Those that are in none of these wait or are under way."""

    read: int = 0  # the store has read what it wanted
    dropped: int = 0  # the queue was full
    gone: int = 0  # the blocks were not there any more
    failed: int = 0  # the lease ran out, the store refused, or the stream broke
