"""Measuring the store's tiers next to what the machine gives without one.

In every round the store and its limit do the same to the same amount of data, in turns of a part of
it, so that a noisy machine is as noisy for both:

    cpu put    begin, copy blocks into slots, commit                      | copy to the same memory
    put+seal   the same, until all blocks have their checksums, too       | the same copy
    cpu get    get, copy the slot out, unpin                              | copy from it
    nvme put   blocks through the tier's queue, in batches                | pwrite, in sequence
    nvme get   get: promote into slots, verify, in random order           | pread at random offsets

A put ends when all its blocks can be found. `put+seal` ends when all of them would survive the
process, too: a lasting stream of puts has something between both, as blocks that are evicted before
they are hashed never are. On both sides one thread copies, as a transport's does, and lets go of
the interpreter lock meanwhile. The store hashes in another one, and has ended before the limit's
turn begins.

The limits of NVMe use as many threads, the same batches, and O_DIRECT when the tier does.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from baton.types.fleet import KvLayout
from baton.types.kv_events import Tier
from kvstore.disk_options import DiskOptions
from kvstore.disk_tier import WRITERS, DiskTier
from kvstore.eviction import make_policy
from kvstore.files import OsFiles
from kvstore.format import NO_PARENT, BlockInfo, checksum, fingerprint
from kvstore.journal import Journal, TierChanges
from kvstore.loads import LoadOptions
from kvstore.memory_tier import MemoryTier
from kvstore.slot_table import HEADER_BYTES, SlotTable, map_file
from kvstore.store import Store, StoreOptions

CHAIN = 64  # keys of one lookup
OFFER_BYTES = 4 << 20  # of blocks that are put together, as workers offer them; at least one
LOOKUPS = 2000
INDEXED = 20_000  # blocks, for sizes and speeds of indexes

Times = dict[str, tuple[float, float]]  # operation -> seconds of the store, of its limit
Side = Callable[[Sequence[int]], Awaitable[float]]  # numbers of blocks -> seconds


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tiers are: a directory in shared memory, and one on the disk."""

    shm: Path
    disk: Path
    direct: bool
    threads: int


@dataclass(frozen=True, slots=True)
class TierResult:
    """Medians over rounds; GB/s = 1e9 bytes/s."""

    tier: str
    operation: str
    block_kib: int
    blocks: int
    store_gbps: float
    limit_gbps: float
    ratio: float  # median over rounds of store / limit in the same round


@dataclass(frozen=True, slots=True)
class IndexResult:
    """Keys are looked up in runs of CHAIN. Bytes of the process's memory, without the payload."""

    tier: str
    lookups_per_s: float
    bytes_per_block: float


def bench_layout(block_kib: int) -> KvLayout:
    """Blocks of that many KiB: 4 layers of keys and values, 16 tokens, float32."""
    return KvLayout("bench", "float32", 4, 1, block_kib * 1024 // (4 * 2 * 16 * 4), 16)


def key_of(number: int) -> bytes:
    return random.Random(number).randbytes(16)


class MemoryBench:
    """A CPU tier of `blocks` slots; data in and out of it."""

    def __init__(self, place: Place, block_kib: int, blocks: int) -> None:
        self.layout = bench_layout(block_kib)
        self.size = self.layout.block_bytes
        self.blocks = blocks
        self.slots = _shared(place.shm, blocks * self.size)
        self.plain = _shared(place.shm, blocks * self.size)  # the same kind of memory, no store
        self.pool = memoryview(mmap.mmap(-1, blocks * self.size))  # a worker's
        for area in (self.slots, self.plain, self.pool):
            _fill(area)
        self.journal = Journal()
        table = SlotTable(
            memoryview(bytearray(blocks * HEADER_BYTES)), fingerprint(self.layout), self.size
        )
        self.memory = MemoryTier(
            self.slots, table, self.size, make_policy("lru"), self.journal.of(Tier.CPU)
        )
        self.keys: list[bytes] = []
        self.random = np.random.default_rng(blocks)
        self.spots = self.random.permutation(blocks).tolist()  # of blocks in the plain memory

    async def rounds(self, count: int) -> list[TierResult]:
        store = Store(self.memory, None, self.journal)
        await store.open()
        times: list[Times] = []
        for number in range(count + 1):
            self.keys = [key_of(number * self.blocks + n) for n in range(self.blocks)]
            times.append(await self._round(store))
        await store.close()
        return _results("cpu", self.size, self.blocks, times[1:])  # the first filled the memory

    async def _round(self, store: Store) -> Times:
        # In different orders: else slots are evicted one after the other, and reused in sequence.
        in_order = self.random.permutation(self.blocks).tolist()
        out_order = self.random.permutation(self.blocks).tolist()
        sealing: list[float] = []
        # Few turns: each ends when its last block is hashed.
        put = await _in_turns(in_order, 4, partial(self._put, store, sealing), self._copy_in)
        get = await _in_turns(out_order, 8, partial(self._get, store), self._copy_out)
        return {"put": put, "put+seal": (put[0] + sum(sealing), put[1]), "get": get}

    async def _put(self, store: Store, sealing: list[float], part: Sequence[int]) -> float:
        """Adds to `sealing` how much longer it took until all were sealed."""
        began = time.perf_counter()
        step = max(1, OFFER_BYTES // self.size)
        for start in range(0, len(part), step):
            offer = part[start : start + step]
            keys = [self.keys[n] for n in offer]
            for n, slot in zip(offer, store.begin_puts(keys), strict=True):
                if slot is None:
                    raise OSError("the store did not take all blocks")
                _copy(self.memory.view(slot), self._block(self.pool, n))
            for key in keys:
                store.commit_put(key)
            await asyncio.sleep(0)
        found = time.perf_counter()
        await store.settle()
        sealing.append(time.perf_counter() - found)
        return found - began

    async def _copy_in(self, part: Sequence[int]) -> float:
        began = time.perf_counter()
        for n in part:
            _copy(self._block(self.plain, self.spots[n]), self._block(self.pool, n))
        return time.perf_counter() - began

    async def _get(self, store: Store, part: Sequence[int]) -> float:
        keys = [self.keys[n] for n in part]
        began = time.perf_counter()
        async for index, slot in store.get(keys):
            _copy(self._block(self.pool, part[index]), self.memory.view(slot))
            store.unpin([keys[index]])
        return time.perf_counter() - began

    async def _copy_out(self, part: Sequence[int]) -> float:
        began = time.perf_counter()
        for n in part:
            _copy(self._block(self.pool, n), self._block(self.plain, self.spots[n]))
        return time.perf_counter() - began

    def _block(self, area: memoryview, n: int) -> memoryview:
        return area[n * self.size : (n + 1) * self.size]


class DiskBench:
    """An NVMe tier of `blocks`, and a plain file next to it."""

    def __init__(self, place: Place, block_kib: int, blocks: int) -> None:
        self.layout = bench_layout(block_kib)
        self.size = self.layout.block_bytes
        self.blocks = blocks
        self.place = place
        self.options = DiskOptions(
            place.disk / "store",
            max_bytes=4 * blocks * self.size,
            floor_bytes=0,
            threads=place.threads,
            direct=place.direct,
        )
        self.batch = max(1, self.options.batch_bytes // self.size)
        self.raw = place.disk / "raw"
        self.spots = max(blocks // 4, 32)
        self.slots = _shared(place.shm, self.spots * self.size)
        self.plain = _shared(place.shm, self.spots * self.size)  # as large, and as cold
        self.source = memoryview(mmap.mmap(-1, self.batch * WRITERS * self.size))
        for area in (self.slots, self.plain, self.source):
            _fill(area)
        self.direct = False

    async def rounds(self, count: int) -> list[TierResult]:
        times = [await self._round(number) for number in range(count)]
        return _results("nvme", self.size, self.blocks, times)

    async def _round(self, number: int) -> Times:
        shutil.rmtree(self.options.directory, ignore_errors=True)
        disk = DiskTier(self.options, self.layout, TierChanges())
        await disk.open()
        self.direct = disk.direct
        keys = [key_of(number * self.blocks + n) for n in range(self.blocks)]
        order = np.random.default_rng(number).permutation(self.blocks).tolist()
        turns = 2  # few: in each, what is read ahead has to begin and to end
        with self._raw_file() as fd, ThreadPoolExecutor(self.place.threads) as threads:
            write, read = partial(self._write, fd, threads), partial(self._read, fd, threads)
            put = await _in_turns(range(self.blocks), turns, partial(self._put, disk, keys), write)
            get = await _in_turns(order, turns, partial(self._get, disk, keys), read)
        await disk.close()
        return {"put": put, "get": get}

    async def _put(self, disk: DiskTier, keys: Sequence[bytes], part: Sequence[int]) -> float:
        """As demotion does: so many at a time, with checksums from when the blocks were put."""
        blocks = [(keys[n], self._source(n)) for n in part]
        waiting = iter([(BlockInfo(k, 0, NO_PARENT, checksum(b)), b) for k, b in blocks])

        async def demote() -> None:
            for info, block in waiting:
                if not await disk.write(info, block):
                    raise OSError("the disk did not take all blocks")

        began = time.perf_counter()
        await asyncio.gather(*(demote() for _ in range(2 * WRITERS * self.batch)))
        return time.perf_counter() - began

    async def _write(self, fd: int, threads: ThreadPoolExecutor, part: Sequence[int]) -> float:
        loop = asyncio.get_running_loop()
        starts = range(part[0], part[-1] + 1, self.batch)
        began = time.perf_counter()
        limit = asyncio.Semaphore(WRITERS)

        async def write(start: int) -> None:
            async with limit:
                count = min(self.batch, part[-1] + 1 - start)
                buffers = [self._source(n) for n in range(count)]
                await loop.run_in_executor(threads, os.pwritev, fd, buffers, start * self.size)

        await asyncio.gather(*map(write, starts))
        return time.perf_counter() - began

    async def _get(self, disk: DiskTier, keys: Sequence[bytes], part: Sequence[int]) -> float:
        table = SlotTable(
            memoryview(bytearray(self.slots.nbytes // self.size * HEADER_BYTES)),
            fingerprint(self.layout),
            self.size,
        )
        changes = TierChanges()
        memory = MemoryTier(self.slots, table, self.size, make_policy("lru"), changes)
        loads = LoadOptions(batches_ahead=2 * self.place.threads)
        store = Store(memory, disk, Journal(), StoreOptions(loads=loads))
        wanted = [keys[n] for n in part]
        began = time.perf_counter()
        count = 0
        async for index, _ in store.get(wanted):
            store.unpin([wanted[index]])
            count += 1
        took = time.perf_counter() - began
        if count != len(wanted):
            raise OSError("the disk did not give back all blocks")
        return took

    async def _read(self, fd: int, threads: ThreadPoolExecutor, part: Sequence[int]) -> float:
        def read(thread: int) -> None:
            for at in range(thread, len(part), self.place.threads):
                spot = at % self.spots * self.size
                os.preadv(fd, [self.plain[spot : spot + self.size]], part[at] * self.size)

        began = time.perf_counter()
        await asyncio.to_thread(lambda: list(threads.map(read, range(self.place.threads))))
        return time.perf_counter() - began

    def _source(self, n: int) -> memoryview:
        n %= self.batch * WRITERS
        return self.source[n * self.size : (n + 1) * self.size]

    @contextmanager
    def _raw_file(self) -> Iterator[int]:
        fd = OsFiles().create(self.raw, self.blocks * self.size, self.direct)
        try:
            yield fd
        finally:
            os.close(fd)
            self.raw.unlink()


async def measure_indexes(place: Place) -> list[IndexResult]:
    """Lookups and memory of INDEXED small blocks in each tier."""
    keys = [key_of(n) for n in range(INDEXED)]
    journal = Journal()
    layout = bench_layout(4)
    options = DiskOptions(
        place.disk / "index", 4 * INDEXED * layout.block_bytes, floor_bytes=0, direct=place.direct
    )
    disk = DiskTier(options, layout, journal.of(Tier.NVME))
    await disk.open()
    block = memoryview(mmap.mmap(-1, layout.block_bytes))
    digest = checksum(block)
    await asyncio.gather(*(disk.write(BlockInfo(key, 0, NO_PARENT, digest), block) for key in keys))
    nvme = IndexResult(
        "nvme", _lookups(Store(_tiny(1), disk, journal), keys), disk.index_bytes / disk.capacity
    )
    await disk.close()
    tracemalloc.start()
    memory = _tiny(INDEXED)
    for n, key in enumerate(keys):
        depth = n % CHAIN
        memory.begin(key, depth, keys[n - 1] if depth else NO_PARENT)
        memory.seal(memory.commit(key), digest)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return [IndexResult("cpu", _lookups(Store(memory, None, journal), keys), used / INDEXED), nvme]


def _tiny(slots: int) -> MemoryTier:
    """A CPU tier whose blocks are single bytes."""
    table = SlotTable(memoryview(mmap.mmap(-1, slots * HEADER_BYTES)), bytes(16), 1)
    payload = memoryview(mmap.mmap(-1, slots))
    return MemoryTier(payload, table, 1, make_policy("lru"), TierChanges())


def _lookups(store: Store, keys: Sequence[bytes]) -> float:
    """Keys found per second."""
    random_ = random.Random(1)
    starts = [random_.randrange(len(keys) - CHAIN) for _ in range(LOOKUPS)]
    began = time.perf_counter()
    found = sum(len(store.lookup(keys[start : start + CHAIN])) for start in starts)
    return found / (time.perf_counter() - began)


async def _in_turns(
    order: Sequence[int], parts: int, store: Side, limit: Side
) -> tuple[float, float]:
    """Seconds that each took for all blocks. Who is second in one turn, and finds its source in the
    caches, is first in the next."""
    step = max(1, -(-len(order) // parts))
    took = [0.0, 0.0]
    for turn, start in enumerate(range(0, len(order), step)):
        part = order[start : start + step]
        for side in (turn % 2, 1 - turn % 2):
            took[side] += await (limit if side else store)(part)
    return took[0], took[1]


def _results(tier: str, size: int, blocks: int, times: Sequence[Times]) -> list[TierResult]:
    results = []
    for operation in times[0]:
        store, limit = zip(*(one[operation] for one in times), strict=True)
        results.append(
            TierResult(
                tier,
                operation,
                size >> 10,
                blocks,
                blocks * size / median(store) / 1e9,
                blocks * size / median(limit) / 1e9,
                median(b / a for a, b in zip(store, limit, strict=True)),
            )
        )
    return results


def _copy(to: memoryview, source: memoryview) -> None:
    """Without the interpreter lock, unlike a copy between memoryviews."""
    np.copyto(np.frombuffer(to, dtype=np.uint8), np.frombuffer(source, dtype=np.uint8))


def _shared(directory: Path, nbytes: int) -> memoryview:
    """Named shared memory, as a store has it, but forgotten at once."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        return memoryview(map_file(Path(name) / "area", nbytes))


def _fill(area: memoryview) -> None:
    """Write to every byte: pages exist, and neighbouring blocks differ."""
    piece = np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8)
    target = np.frombuffer(area, dtype=np.uint8)
    for start in range(0, target.nbytes, piece.nbytes):
        target[start : start + piece.nbytes] = piece[: target.nbytes - start] + np.uint8(
            start >> 20
        )
