"""A store's disk: files in memory that fail as a device does, under the production tier.

    call    takes virtual time, sometimes long; happens in the middle of it
    read    fails (EIO); or a bit of what is read has changed on the medium, for good
    write   fails (EIO, ENOSPC) when a part of it is done
    kill    of what was being written a part is there; with the power, whatever was written
            lately is lost page by page, because nothing is ever synchronized

Faults of the disk are no excuse for anything: no request may fail, and no token change, for them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import ParamSpec, TypeVar

from baton.types.fleet import KvLayout
from kvstore.disk_options import DiskOptions
from kvstore.disk_tier import DiskTier
from kvstore.format import ALIGN, padded
from kvstore.journal import TierChanges
from kvstore.segment_io import Place
from sim.log import EventLog

T = TypeVar("T")
P = ParamSpec("P")

DIRECTORY = Path("disk")
WRITEBACK_S = 2.0  # after which a page is on the medium
FULL_S = 1.0  # that a full disk stays full
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """A disk and what may happen to its calls. Rates are probabilities, times seconds."""

    slots: int  # of the CPU tier in front of it: few, so that blocks go to disk
    records: int  # of a segment
    segments: int
    call_s: float
    error_limit: int
    slow_rate: float = 0.0
    slow_s: float = 0.0
    error_rate: float = 0.0
    full_rate: float = 0.0
    rot_rate: float = 0.0  # of reads
    power_rate: float = 0.0  # of kills


def draw_disk(rng: Random) -> DiskPlan:
    def sometimes(rate: float) -> float:
        return rate if rng.random() < 0.4 else 0.0

    return DiskPlan(
        slots=rng.randint(8, 12),
        records=rng.randint(2, 6),
        segments=rng.randint(2, 8),
        call_s=rng.choice((0.0002, 0.002, 0.02)),
        error_limit=rng.choice((3, 16)),
        slow_rate=sometimes(0.05),
        slow_s=rng.choice((0.3, 2.0, 6.0)),
        error_rate=sometimes(0.1),
        full_rate=sometimes(0.03),
        rot_rate=sometimes(0.3),
        power_rate=sometimes(0.7),
    )


@dataclass(slots=True, eq=False)
class _File:
    data: bytearray
    damaged: set[int] = field(default_factory=set)  # pages that are not what was written
    torn: set[int] = field(default_factory=set)  # by writes that failed; the next life cannot know


@dataclass(frozen=True, slots=True)
class _Change:
    """Something that is not on the medium yet, and what takes it back."""

    at: float
    call: int
    undo: Callable[[], None]


class ModelledDisk:
    """Outlives the processes that use it. Implements `kvstore.files.FileOps`."""

    def __init__(
        self,
        plan: DiskPlan,
        name: str,
        rng: Random,
        now: Callable[[], float],
        is_calm: Callable[[], bool],
        log: EventLog,
    ) -> None:
        self.plan = plan
        self.tier: DiskTier | None = None  # of the process that runs
        self._name = name
        self._rng = rng
        self._now = now
        self._is_calm = is_calm
        self._log = log
        self._files: dict[str, _File] = {}
        self._open: dict[int, _File] = {}
        self._next_fd = 3  # never given twice: a closed one is noticed
        self._locked_by: int | None = None
        self._full_until = 0.0
        self._changes: list[_Change] = []  # oldest first
        self._calls: set[int] = set()  # under way
        self._call = 0

    def make_tier(
        self, layout: KvLayout, changes: TierChanges, slowness: Callable[[], float]
    ) -> DiskTier:
        """Of a new life of the store."""
        records = ALIGN + self.plan.records * (ALIGN + padded(layout.block_bytes))
        index = padded(20 * self.plan.records) + ALIGN
        options = DiskOptions(
            DIRECTORY,
            max_bytes=self.plan.segments * (records + index),
            segment_bytes=records,
            batch_bytes=3 * (ALIGN + padded(layout.block_bytes)),
            error_limit=self.plan.error_limit,
            pause_s=FULL_S,
        )
        threads = DiskThreads(self, slowness)
        self.tier = DiskTier(options, layout, changes, self, threads)
        return self.tier

    def crash(self) -> bool:
        """The process was killed. Whether the machine went with it."""
        self._open.clear()
        self._locked_by = None
        for file in self._files.values():
            file.damaged |= file.torn
        power = self._rng.random() < self.plan.power_rate
        since = self._now() - WRITEBACK_S
        for change in reversed(self._changes):
            lost = power and change.at >= since
            if (lost or change.call in self._calls) and self._rng.random() < 0.5:
                change.undo()
        if power:
            self._log.note(self._name, "disk", "the power fails")
        self._changes.clear()
        self._calls.clear()
        return power

    def check(self) -> list[str]:
        """When all is idle and calm: what the tier says it has is on the medium, but for what the
        disk has damaged itself."""
        tier = self.tier
        if tier is None:
            return []
        wrong = []
        stride, into = tier.format.stride, memoryview(bytearray(tier.block_bytes))
        for key in tier:
            segment, position = tier._log.find(key) or (None, 0)
            if segment is None:
                continue
            place, page = Place(segment.number, segment.fd, position), memoryview(bytearray(ALIGN))
            first = tier.format.offset(position) // ALIGN
            pages = range(first, first + stride // ALIGN)
            whole = tier._log.io.read(place, key, into, page) is not None
            if not whole and self._file(segment.fd).damaged.isdisjoint(pages):
                wrong.append(f"{self._name} does not have a block that its NVMe tier lists")
        return wrong

    def check_closed(self) -> list[str]:
        """After an orderly end."""
        return [f"{self._name} left {len(self._open)} files open"] if self._open else []

    # -- calls, see DiskThreads ----------------------------------------------------------------

    def call_s(self, slowness: float) -> float:
        """On a machine that is slower by that factor. A hang of the disk is not longer for it."""
        if self._chance(self.plan.slow_rate):
            return self.plan.slow_s
        return self.plan.call_s * self._rng.uniform(0.5, 1.5) * slowness

    @contextmanager
    def calling(self) -> Iterator[None]:
        """What is changed first of all in it is half done when the process is killed in it."""
        self._call += 1
        call = self._call
        self._calls.add(call)
        try:
            yield
        finally:
            self._calls.discard(call)

    # -- kvstore.files.FileOps -----------------------------------------------------------------

    def lock(self, path: Path) -> int:
        if self._locked_by is not None:
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        self._locked_by = self._opened(_File(bytearray()))
        return self._locked_by

    def names(self, directory: Path) -> list[str]:
        return sorted(self._files)

    def free_bytes(self, directory: Path) -> int:
        return 0 if self._is_full() else 1000 * GIB

    def allows_direct(self, directory: Path) -> bool:
        return False

    def create(self, path: Path, nbytes: int, direct: bool) -> int:
        self._may_fail("create")
        if self._is_full():
            raise OSError(errno.ENOSPC, "the modelled disk is full")
        if path.name in self._files:
            raise FileExistsError(errno.EEXIST, path.name)
        file = self._files[path.name] = _File(bytearray(nbytes))
        self._changed(lambda: self._unlink(path.name, file))
        return self._opened(file)

    def open(self, path: Path, direct: bool) -> int:
        self._may_fail("open")
        if path.name not in self._files:
            raise FileNotFoundError(errno.ENOENT, path.name)
        return self._opened(self._files[path.name])

    def size(self, fd: int) -> int:
        return len(self._file(fd).data)

    def read(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        file = self._file(fd)
        self._may_fail("read")
        rotten = self._rng.choice(buffers) if self._chance(self.plan.rot_rate) else None
        at = offset
        for buffer in buffers:
            if buffer is rotten and at < len(file.data):
                self._rot(file, at)
            part = file.data[at : at + buffer.nbytes]
            buffer.cast("B")[: len(part)] = part
            at += len(part)
        return at - offset

    def write(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        file = self._file(fd)
        data = b"".join(buffers)
        failing = self._fails("write")
        whole = len(data)
        if failing is not None:
            file.torn.update(range(offset // ALIGN, -(-(offset + whole) // ALIGN)))
            data = data[: self._rng.randrange(whole + 1)]
        for at in range(0, len(data), ALIGN):
            self._write_page(file, offset + at, data[at : at + ALIGN])
        if failing is not None:
            raise failing

    def truncate(self, fd: int, nbytes: int) -> None:
        file = self._file(fd)
        self._may_fail("truncate")
        tail = bytes(file.data[nbytes:])
        del file.data[nbytes:]
        self._changed(lambda: file.data.extend(tail))

    def close(self, fd: int) -> None:
        self._file(fd)
        del self._open[fd]
        if fd == self._locked_by:
            self._locked_by = None

    def unlink(self, path: Path) -> None:
        self._may_fail("unlink")
        file = self._files.pop(path.name, None)
        if file is not None:
            self._changed(lambda: self._files.update({path.name: file}))

    # ------------------------------------------------------------------------------------------

    def _opened(self, file: _File) -> int:
        fd = self._next_fd
        self._next_fd += 1
        self._open[fd] = file
        return fd

    def _file(self, fd: int) -> _File:
        if fd not in self._open:
            self._log.violation(f"{self._name} used a file that it had closed")
            raise OSError(errno.EBADF, "closed")
        return self._open[fd]

    def _write_page(self, file: _File, offset: int, data: bytes) -> None:
        end, page = offset + len(data), offset // ALIGN
        file.data.extend(bytes(max(0, end - len(file.data))))
        before = bytes(file.data[offset:end])

        def undo() -> None:
            if end <= len(file.data):
                file.data[offset:end] = before
            file.damaged.add(page)

        file.data[offset:end] = data
        file.damaged.discard(page)
        self._changed(undo)

    def _unlink(self, name: str, file: _File) -> None:
        if self._files.get(name) is file:
            del self._files[name]

    def _changed(self, undo: Callable[[], None]) -> None:
        if not self._is_calm():
            self._changes.append(_Change(self._now(), self._call, undo))

    def _rot(self, file: _File, begin: int) -> None:
        """Where something is: most of a header's page is empty."""
        at = self._rng.randrange(begin, min(begin + 128, len(file.data)))
        self._log.note(self._name, "disk", f"byte {at} rots")
        file.data[at] ^= 1 << self._rng.randrange(8)
        file.damaged.add(at // ALIGN)

    def _is_full(self) -> bool:
        if self._chance(self.plan.full_rate):
            self._log.note(self._name, "disk", "is full")
            self._full_until = self._now() + FULL_S
        return self._now() < self._full_until

    def _fails(self, what: str) -> OSError | None:
        if what == "write" and self._is_full():
            return OSError(errno.ENOSPC, "the modelled disk is full")
        if self._chance(self.plan.error_rate):
            self._log.note(self._name, "disk", f"fails to {what}")
            self._log.excused.add("kvstore.disk_health")  # it may give up such a disk
            return OSError(errno.EIO, f"the modelled disk fails to {what}")
        return None

    def _may_fail(self, what: str) -> None:
        error = self._fails(what)
        if error is not None:
            raise error

    def _chance(self, rate: float) -> bool:
        return rate > 0 and not self._is_calm() and self._rng.random() < rate


class DiskThreads:
    """Implements `kvstore.files.Threads`."""

    def __init__(self, disk: ModelledDisk, slowness: Callable[[], float]) -> None:
        self._disk = disk
        self._slowness = slowness

    def open(self) -> None:
        """There is no thread to start."""

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        half_s = self._disk.call_s(self._slowness()) / 2
        try:
            await asyncio.sleep(half_s)
        except asyncio.CancelledError:
            with suppress(OSError):
                call(*args, **kwargs)  # a thread is not stopped
            raise
        with self._disk.calling():
            try:
                return call(*args, **kwargs)
            finally:
                await asyncio.sleep(half_s)

    def close(self) -> None:
        """There is no thread to end."""
