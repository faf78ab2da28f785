"""The tier policy of one node's KV store: CPU memory in front of NVMe. No network, no torch.

    put       begin_puts -> the caller fills the slots -> commit_put -> found; sealed  CPU
    get       READY slots at once; blocks on NVMe are read into slots (promotion)      NVMe -> CPU
    demotion  ahead of need, the next victims of the CPU tier are written and freed    CPU -> NVMe
              a chain is written from its beginning and freed from its end: whatever is
              lost between the two, what is on NVMe can be used
    keep      a block that is pinned for a time is no victim; see kvstore/pins.py

Nobody waits for room: when no slot is free, the next victim is evicted at once, and lost if it is
not on NVMe yet. How often that happens is counted. Blocks that are being demoted stay readable.

Every slot that is handed out belongs to who got it: FILLING until commit or abort, pinned until
unpin. Promotions and demotions are tasks of the store, so a caller may be cancelled at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.errors import InternalError
from baton.types.figures import StoreFigures
from baton.types.kv_events import Tier
from baton.worker.kv_news import Change
from kvstore.disk_options import DiskState
from kvstore.disk_tier import DiskTier
from kvstore.figures import Refusal, StoreStats, store_figures
from kvstore.files import ThreadPool, Threads
from kvstore.format import NO_PARENT
from kvstore.journal import Journal
from kvstore.loads import LoadOptions, Loads, Run
from kvstore.memory_tier import MemoryTier
from kvstore.pins import Pins
from kvstore.sealing import Sealer, SealOptions

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoreOptions:
    spare_slots: int = 32  # kept FREE by demoting ahead of need; at most an eighth of all
    demotions: int = 32  # blocks that are written to NVMe at a time
    pin_share: float = 0.5  # of the CPU tier, for blocks that are pinned for a time
    loads: LoadOptions = field(default_factory=LoadOptions)
    sealing: SealOptions = field(default_factory=SealOptions)


class Store:
    """The only owner of which tier a block is in. Belongs to the event loop."""

    def __init__(
        self,
        memory: MemoryTier,
        disk: DiskTier | None,
        journal: Journal,
        options: StoreOptions | None = None,
        threads: Threads | None = None,  # to hash in
    ) -> None:
        self.stats = StoreStats()
        self._memory = memory
        self._disk = disk
        self._journal = journal
        self._options = options or StoreOptions()
        self._spare = max(1, min(self._options.spare_slots, memory.num_slots // 8))
        self._pins = Pins(memory, int(self._options.pin_share * memory.num_slots))
        self.loads = Loads(memory, disk, self._slot_for_load, self._options.loads)
        sealing = self._options.sealing
        threads = threads or ThreadPool(sealing.threads, "kvstore hash")
        self._sealer = Sealer(memory, threads, sealing)
        self._demoting: dict[bytes, asyncio.Task[None]] = {}
        self._to_write: deque[bytes] = deque()  # a victim's chain, from its beginning on

    # Life

    async def open(self) -> None:
        """Find again what both tiers held: blocks in memory come back one after the other, as they
        are verified; until then they are not there. Raises what `DiskTier.open` does."""
        if self._disk is not None:
            await self._disk.open()
        self._sealer.open()

    async def settle(self) -> None:
        """Wait until no block is on its way between tiers, or waits to be hashed."""
        self._sealer.hurry()
        while tasks := [*self._demoting.values(), *self.loads.tasks, *self._sealer.tasks]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """End what is under way. What is in memory and on disk stays there for the next start."""
        if self._disk is not None:
            await self._disk.close()
        while tasks := [*self._demoting.values(), *self.loads.tasks]:  # they may need the sealer
            await asyncio.wait(tasks)
        await self._sealer.close()

    # Looking

    def lookup(self, keys: Iterable[bytes]) -> list[Tier]:
        """The leading run of these keys: the fastest tier of each, up to the first miss."""
        memory, disk = self._memory, self._disk
        run: list[Tier] = []
        for key in keys:
            if key in memory:
                run.append(Tier.CPU)
            elif disk is not None and key in disk:
                run.append(Tier.NVME)
            else:
                break
        return run

    # Putting

    def begin_puts(
        self,
        keys: Iterable[bytes],
        depth: int = 0,
        parent: bytes = NO_PARENT,
        keep_s: float | None = None,
    ) -> list[int | None]:
        """Slots to fill with these blocks of one chain, one after the other; None where a block is
        not wanted, see Refusal. With `keep_s`, `keep` each of them, too.

        `depth` blocks come before the first of them; the last of these has the key `parent`, if
        that is known.
        The caller ends each slot by `commit_put` or `abort_put`, whatever happens.
        """
        now = asyncio.get_running_loop().time()
        self._pins.expire(now)
        behind = self._sealer.behind
        slots: list[int | None] = []
        for key in keys:
            refusal = self._refusal(key) or (Refusal.PRESSURE if behind else None)
            slot = None if refusal else self._take_slot(key, depth, parent)
            if slot is None:
                self.stats.refused[refusal or Refusal.PRESSURE] += 1
            if keep_s is not None:  # before the next slot is taken, which could cost this block
                self._pins.pin(key, now + keep_s)
            slots.append(slot)
            depth, parent = depth + 1, key
        self._demote_ahead()
        return slots

    def commit_put(self, key: bytes) -> None:
        """The slot is filled, by bytes that are known to be right. The block can be found from now
        on. It outlives the process once it is sealed, off the event loop, in order of commits."""
        self._sealer.add(self._memory.commit(key))
        self.stats.stored += 1

    def abort_put(self, key: bytes) -> None:
        """Nobody writes to the slot any more, and it is not complete."""
        self._memory.abort(key)
        self.stats.aborted += 1

    # Getting

    async def get(self, keys: Sequence[bytes]) -> AsyncGenerator[tuple[int, int], None]:
        """Yields (index, slot) in order, from the first key to the one before the first miss.

        Each is pinned when it is yielded: the caller owes one `unpin` of its key. Close the
        generator (contextlib.aclosing) to end early.
        """
        wanted = keys[: len(self.lookup(keys))]
        run = Run(self.loads, wanted)
        try:
            for index, key in enumerate(wanted):
                if not await run.arrived(index):
                    return
                self.stats.hits[Tier.NVME if run.take(index) else Tier.CPU] += 1
                self._memory.hit(key)
                slot = self._memory.slot_of(key)
                if slot is None:
                    raise InternalError("A pinned block was evicted.")
                yield index, slot
        finally:
            run.let_go()

    def unpin(self, keys: Iterable[bytes]) -> None:
        """Give back one pin of each."""
        for key in keys:
            self._memory.unpin(key)

    def keep(self, key: bytes, seconds: float) -> bool:
        """Pin the block, if it is in memory or being put, for that time at least. False: it is
        not, or too many are pinned already; that is counted."""
        now = asyncio.get_running_loop().time()
        self._pins.expire(now)
        return self._pins.pin(key, now + seconds)

    # Telling

    def take_changes(self) -> list[Change]:
        """What came and went since the last call."""
        return self._journal.take()

    def holdings(self) -> list[tuple[Tier, bytes]]:
        """The keys of all blocks, by tier."""
        tiers: list[tuple[Tier, Iterable[bytes]]] = [(Tier.CPU, self._memory)]
        if self._disk is not None:
            tiers.append((Tier.NVME, self._disk))
        return [(tier, b"".join(keys)) for tier, keys in tiers]

    def figures(self) -> StoreFigures:
        """For metrics."""
        self._pins.expire(asyncio.get_running_loop().time())
        return store_figures(self.stats, self._memory, self._disk, self._pins, self._sealer)

    def check_integrity(self) -> None:
        """Raise InternalError unless all accounts agree. O(slots + blocks on disk)."""
        self._memory.check_integrity()
        if self._disk is not None:
            self._disk.check_integrity()
        _require(len(self._demoting) <= self._options.demotions, "too many demotions")
        pins = self._memory.pins()
        for key in self._demoting:
            _require(pins.get(key, 0) > 0, "a block is demoted without a pin")
        self.loads.check_integrity()
        self._pins.check_integrity()

    # Slots

    def _refusal(self, key: bytes) -> Refusal | None:
        if key in self._memory:
            self._memory.hit(key)
            return Refusal.PRESENT
        return Refusal.BUSY if self._memory.is_filling(key) else None

    def _slot_for_load(self, key: bytes, urgent: bool) -> int | None:
        self._pins.expire(asyncio.get_running_loop().time())
        slot = self._take_slot(key, may_lose=urgent)
        self._demote_ahead()
        return slot

    def _take_slot(
        self, key: bytes, depth: int = 0, parent: bytes = NO_PARENT, may_lose: bool = True
    ) -> int | None:
        if not self._memory.free and not self._evict_now(may_lose):
            return None
        return self._memory.begin(key, depth, parent)

    def _evict_now(self, may_lose: bool) -> bool:
        victim = self._memory.victim()
        if victim is None or not (may_lose or self._is_on_disk(victim)):
            return False
        self._evict(victim, written=False)
        return True

    def _is_on_disk(self, key: bytes) -> bool:
        return self._disk is not None and key in self._disk

    def _evict(self, key: bytes, written: bool) -> None:
        if written:
            self.stats.demoted += 1
        elif self._disk is None or key in self._disk:
            self.stats.evicted += 1
        else:
            self.stats.lost += 1
        self._memory.evict(key)

    # Demotion

    def _demote_ahead(self) -> None:
        """Write the next victims to NVMe, so that slots are FREE when they are needed."""
        if self._disk is None or self._disk.state is not DiskState.ON:
            return
        while self._memory.free + len(self._demoting) < self._spare:
            if len(self._demoting) >= self._options.demotions:
                return
            victim = self._memory.victim()
            if victim is None:
                return
            if victim in self._disk:
                self._evict(victim, written=False)
                continue
            key = self._next_to_write(victim)
            if key is None:
                return
            self._memory.pin(key)
            self._demoting[key] = self._spawn(self._demote(self._disk, key))

    def _next_to_write(self, victim: bytes) -> bytes | None:
        """The first block of the victim's chain that is not on NVMe nor on its way there."""
        while True:
            while self._to_write:
                key = self._to_write.popleft()
                if self._is_unwritten(key):
                    return key
            key = victim
            while key in self._memory and not self._is_on_disk(key):
                self._to_write.appendleft(key)
                key = self._memory.parent_of(key)
            if not any(self._is_unwritten(key) for key in self._to_write):
                self._to_write.clear()
                return None

    def _is_unwritten(self, key: bytes) -> bool:
        return key in self._memory and key not in self._demoting and not self._is_on_disk(key)

    async def _demote(self, disk: DiskTier, key: bytes) -> None:
        slot = self._memory.slot_of(key)
        written = False
        try:
            if slot is not None:
                info = await self._sealer.info(key)
                written = await disk.write(info, self._memory.view(slot))
        finally:
            del self._demoting[key]
            self._memory.unpin(key)
        # Who came for it meanwhile keeps it in memory; it can go at once another time.
        if written and self._memory.victim() == key:
            self._evict(key, written)
        self._demote_ahead()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(_log_failure)
        return task


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("Moving a KV block between tiers failed.", exc_info=error)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InternalError(f"Store accounting is broken: {message}.")
