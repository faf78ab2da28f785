"""Small stores over real files, with disks that fail and threads that are none."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

from baton.types.fleet import KvLayout
from baton.types.kv_events import Tier
from kvstore.disk_options import DiskOptions
from kvstore.disk_tier import DiskTier
from kvstore.eviction import make_policy
from kvstore.files import FileOps, OsFiles, Threads
from kvstore.format import ALIGN, NO_PARENT, BlockInfo, checksum, fingerprint, padded
from kvstore.journal import Journal, TierChanges
from kvstore.memory_tier import MemoryTier
from kvstore.slot_table import HEADER_BYTES, SlotTable
from kvstore.store import Store, StoreOptions

T = TypeVar("T")
P = ParamSpec("P")

LAYOUT = KvLayout("m" * 64, "bfloat16", 1, 1, 32, 32)
BLOCK = LAYOUT.block_bytes  # 4096


def key_of(n: int) -> bytes:
    return n.to_bytes(16, "big")


def chain_of(first: int, length: int) -> list[bytes]:
    return [key_of(n) for n in range(first, first + length)]


def payload_of(key: bytes, nbytes: int = BLOCK) -> bytes:
    """What a block of that key holds: different in every word."""
    return b"".join(key[8:] + n.to_bytes(8, "big") for n in range(-(-nbytes // 16)))[:nbytes]


def info_of(key: bytes, depth: int = 0, parent: bytes = NO_PARENT) -> BlockInfo:
    return BlockInfo(key, depth, parent, checksum(memoryview(payload_of(key))))


class InlineThreads:
    """Calls happen in the event loop, `delay` (of virtual time) after they were asked for."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay

    def open(self) -> None: ...

    def close(self) -> None: ...

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            await asyncio.sleep(self.delay)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                call(*args, **kwargs)  # a thread is not stopped
            raise
        return call(*args, **kwargs)


@dataclass
class FaultyFiles(OsFiles):
    """Operations named in `fail` raise that error, as often as it says (-1: always)."""

    fail: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (errno, times)
    free: int | None = None
    log: list[tuple[str, int]] = field(default_factory=list)  # (name, bytes)

    def _meet(self, name: str, nbytes: int = 0) -> None:
        self.log.append((name, nbytes))
        code, times = self.fail.get(name, (0, 0))
        if times:
            self.fail[name] = (code, times - 1)
            raise OSError(code, f"injected into {name}")

    def create(self, path: Path, nbytes: int, direct: bool) -> int:
        self._meet("create", nbytes)
        return super().create(path, nbytes, direct)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._meet("read", sum(buffer.nbytes for buffer in buffers))
        return super().read(fd, buffers, offset)

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        self._meet("write", sum(len(buffer) for buffer in buffers))
        super().write(fd, buffers, offset)

    def names(self, directory: Path) -> list[str]:
        self._meet("names")
        return super().names(directory)

    def unlink(self, path: Path) -> None:
        self._meet("unlink")
        super().unlink(path)

    def free_bytes(self, directory: Path) -> int:
        return super().free_bytes(directory) if self.free is None else self.free


ALWAYS = -1
FULL = (errno.ENOSPC, ALWAYS)
BROKEN = (errno.EIO, ALWAYS)


def disk_options(directory: Path, records: int = 4, segments: int = 4) -> DiskOptions:
    """Segments of `records` blocks."""
    nbytes = ALIGN + records * (ALIGN + BLOCK)
    index = padded(20 * records) + ALIGN
    return DiskOptions(
        directory,
        segments * (nbytes + index),
        nbytes,
        floor_bytes=0,
        threads=2,
        error_limit=3,
        direct=False,
    )


def make_disk(
    options: DiskOptions,
    files: FileOps | None = None,
    threads: Threads | None = None,
    layout: KvLayout = LAYOUT,
    changes: TierChanges | None = None,
) -> DiskTier:
    changes = changes or TierChanges()
    return DiskTier(options, layout, changes, files, threads or InlineThreads())


@asynccontextmanager
async def opened(disk: DiskTier) -> AsyncIterator[DiskTier]:
    await disk.open()
    try:
        yield disk
    finally:
        await disk.close()


async def write_blocks(disk: DiskTier, keys: Sequence[bytes]) -> list[bool]:
    return list(
        await asyncio.gather(
            *(disk.write(info_of(key), memoryview(payload_of(key))) for key in keys)
        )
    )


async def read_block(disk: DiskTier, key: bytes) -> bytes | None:
    buffer = bytearray(BLOCK)
    (info,) = await disk.read_many([(key, memoryview(buffer))])
    assert info is None or info.key == key
    return bytes(buffer) if info else None


@dataclass
class Areas:
    """What outlives a store's process."""

    payload: bytearray
    headers: bytearray

    @classmethod
    def of(cls, slots: int) -> Areas:
        return cls(bytearray(slots * BLOCK), bytearray(slots * HEADER_BYTES))

    def copy(self) -> Areas:
        return Areas(bytearray(self.payload), bytearray(self.headers))


def make_memory(
    areas: Areas, policy: str = "lru", changes: TierChanges | None = None, layout: KvLayout = LAYOUT
) -> MemoryTier:
    table = SlotTable(memoryview(areas.headers), fingerprint(layout), BLOCK)
    return MemoryTier(
        memoryview(areas.payload), table, BLOCK, make_policy(policy), changes or TierChanges()
    )


def recover(memory: MemoryTier) -> int:
    """Verify all that an earlier process left; how many blocks are whole."""
    return sum(memory.settle(one, checksum(memory.view(one.slot))) for one in memory.claim())


def commit_sealed(memory: MemoryTier, *keys: bytes) -> None:
    """As a store does in the end: the blocks outlive this process."""
    for key in keys:
        put = memory.commit(key)
        memory.seal(put, checksum(memory.view(put.slot)))


@dataclass
class Rig:
    """A store and its parts."""

    store: Store
    memory: MemoryTier
    disk: DiskTier | None

    def begin(self, key: bytes, depth: int = 0) -> int | None:
        (slot,) = self.store.begin_puts([key], depth)
        return slot

    def put(self, key: bytes, depth: int = 0) -> bool:
        return bool(self.put_many([key], depth))

    def put_many(
        self, keys: Sequence[bytes], depth: int = 0, parent: bytes = NO_PARENT
    ) -> list[bytes]:
        """Blocks of one chain; those that were wanted."""
        slots = self.store.begin_puts(keys, depth, parent)
        wanted = [(key, slot) for key, slot in zip(keys, slots, strict=True) if slot is not None]
        for key, slot in wanted:
            self.memory.view(slot)[:] = payload_of(key)
        for key, _ in wanted:
            self.store.commit_put(key)
        return [key for key, _ in wanted]

    def put_chain(self, keys: Sequence[bytes]) -> None:
        assert self.put_many(keys) == list(keys)

    async def get(self, keys: Sequence[bytes], limit: int | None = None) -> int:
        """How many came, each of them right; unpinned again."""
        count = 0
        async with aclosing(self.store.get(keys)) as blocks:
            async for index, slot in blocks:
                assert index == count
                assert bytes(self.memory.view(slot)) == payload_of(keys[index])
                self.store.unpin([keys[index]])
                count += 1
                if count == limit:
                    break
        return count


def make_rig(
    areas: Areas,
    options: DiskOptions | None,
    store: StoreOptions | None = None,
    files: FileOps | None = None,
    threads: Threads | None = None,
    policy: str = "lru",
) -> Rig:
    journal = Journal()
    memory = make_memory(areas, policy, journal.of(Tier.CPU))
    disk = options and make_disk(options, files, threads, changes=journal.of(Tier.NVME))
    hashing = threads or InlineThreads()
    return Rig(Store(memory, disk, journal, store or StoreOptions(), hashing), memory, disk)


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    await rig.store.open()
    await rig.store.settle()
    try:
        yield rig
        rig.store.check_integrity()
    finally:
        await rig.store.close()
