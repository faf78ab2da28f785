"""Promotion: blocks on their way from NVMe to slots, and the gets that wait for them.

Several gets of one block share one load. A get that goes away leaves its loads to finish: what was
read is kept. Small blocks are read in batches, one thread each, because handing a block to a thread
and back costs as much as reading 64 KiB.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.errors import InternalError
from kvstore.disk_tier import DiskTier
from kvstore.format import BlockInfo
from kvstore.memory_tier import MemoryTier

log = logging.getLogger(__name__)

TakeSlot = Callable[[bytes, bool], int | None]
"""(key, urgent) -> a slot to fill. If it is not urgent, no other block is lost for it."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    batches_ahead: int = 16  # of one get that are read at a time
    batch_bytes: int = 512 << 10  # of one read; at least one block
    timeout_s: float = 5.0  # for one block; then the get ends before it


@dataclass(slots=True)
class LoadStats:
    """Blocks, counted since the start."""

    promoted: int = 0
    failed: int = 0  # damaged or unreadable
    late: int = 0  # gets that ended before a block because it took too long
    cut_short: int = 0  # gets that ended before a block on NVMe because no slot was free


@dataclass(slots=True, eq=False)
class Load:
    """A block that is being read. It gets one pin for each of those who wait."""

    slot: int
    waiters: int = 0
    stored: bool = False
    task: asyncio.Task[None] | None = None  # of its batch; set before anybody can wait


Batch = list[tuple[bytes, Load]]


class Loads:
    """The only owner of loads. Belongs to the event loop."""

    def __init__(
        self, memory: MemoryTier, disk: DiskTier | None, take_slot: TakeSlot, options: LoadOptions
    ) -> None:
        self.stats = LoadStats()
        self.timeout_s = options.timeout_s
        self.batch = max(1, options.batch_bytes // memory.block_bytes)
        self.ahead = options.batches_ahead * self.batch
        self.memory = memory
        self._disk = disk
        self._take_slot = take_slot
        self._loads: dict[bytes, Load] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def tasks(self) -> set[asyncio.Task[None]]:
        """Under way."""
        return self._tasks

    def join(self, key: bytes, urgent: bool, batch: Batch) -> Load | None:
        """A load of the block, which counts the caller as one who waits: one under way, or a new
        one that is added to `batch`. None when it is not on NVMe or there is no slot."""
        load = self._loads.get(key)
        if load is None:
            if self._disk is None or key not in self._disk or self.memory.is_filling(key):
                return None
            slot = self._take_slot(key, urgent)
            if slot is None:
                return None
            load = self._loads[key] = Load(slot)
            batch.append((key, load))
        load.waiters += 1
        return load

    def start(self, batch: Batch) -> None:
        if self._disk is None or not batch:
            return
        task = asyncio.create_task(self._load(self._disk, batch))
        for _, load in batch:
            load.task = task
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def arrived(self, load: Load) -> bool:
        """Whether the block came, pinned for the caller. Waits for it, up to the time limit."""
        if load.task is None:
            raise InternalError("Somebody waits for a load that was not started.")
        if not load.task.done():
            await asyncio.wait([load.task], timeout=self.timeout_s)
            self.stats.late += not load.task.done()
        return load.stored

    def leave(self, key: bytes, load: Load) -> None:
        """Give up one's place among those who wait, or the pin that one got."""
        if load.stored:
            self.memory.unpin(key)
        else:
            load.waiters -= 1

    def check_integrity(self) -> None:
        for key, load in self._loads.items():
            if not self.memory.is_filling(key) or load.waiters < 0 or load.task is None:
                raise InternalError("Accounting of loads is broken.")

    async def _load(self, disk: DiskTier, batch: Batch) -> None:
        infos: list[BlockInfo | None] = [None] * len(batch)
        try:
            infos = await disk.read_many(
                [(key, self.memory.view(load.slot)) for key, load in batch]
            )
        finally:
            for (key, load), info in zip(batch, infos, strict=True):
                self._finish(key, load, info)

    def _finish(self, key: bytes, load: Load, info: BlockInfo | None) -> None:
        del self._loads[key]
        if info is None:
            self.memory.abort(key)
            self.stats.failed += 1
            return
        self.memory.commit_verified(info)
        self.memory.pin(key, load.waiters)
        load.stored = True
        self.stats.promoted += 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("Reading KV blocks from NVMe failed.", exc_info=error)


class Run:
    """The blocks of one get, from the first to the last: pinned in memory, or being loaded for it.

    What is in memory is held from the start, so that no load of the run evicts a part of it.
    """

    def __init__(self, loads: Loads, keys: Sequence[bytes]) -> None:
        self._loads = loads
        self._keys = keys
        self._begun = 0  # all before this have been held
        self._held: dict[int, Load | None] = {}  # None: pinned in memory
        for index, key in enumerate(keys):
            self._pin(index, key)

    async def arrived(self, index: int) -> bool:
        """Whether the block is in memory now; loads what follows it meanwhile."""
        self._look_ahead(index)
        if index not in self._held:
            self._loads.stats.cut_short += 1
            return False
        load = self._held[index]
        return load is None or await self._loads.arrived(load)

    def take(self, index: int) -> bool:
        """The caller owns the block's pin from now on. Whether it came from NVMe."""
        return self._held.pop(index) is not None

    def let_go(self) -> None:
        """Give back all that was not taken."""
        for index, load in self._held.items():
            if load is None:
                self._loads.memory.unpin(self._keys[index])
            else:
                self._loads.leave(self._keys[index], load)
        self._held.clear()

    def _look_ahead(self, index: int) -> None:
        """Begin what is near. Where that fails for want of a slot, it is tried again later."""
        end = min(len(self._keys), index + self._loads.ahead)
        if index < self._begun and end - self._begun < self._loads.batch and end < len(self._keys):
            return  # until there is a batch to be read
        batch: Batch = []
        while self._begun < end and self._hold(self._begun, self._begun == index, batch):
            self._begun += 1
            if len(batch) == self._loads.batch:
                self._loads.start(batch)
                batch = []
        self._loads.start(batch)

    def _hold(self, index: int, urgent: bool, batch: Batch) -> bool:
        key = self._keys[index]
        if index in self._held or self._pin(index, key):
            return True
        load = self._loads.join(key, urgent, batch)
        if load is not None:
            self._held[index] = load
        return load is not None

    def _pin(self, index: int, key: bytes) -> bool:
        if key not in self._loads.memory:
            return False
        self._loads.memory.pin(key)
        self._held[index] = None
        return True
