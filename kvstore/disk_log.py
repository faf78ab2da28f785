"""The segments of an open NVMe tier and the index over them: where each block is on disk.

    room     a new segment costs the segment that was used longest ago; while one is emptier than
             half, what is left of it is moved to the new one

Deleting changes memory only. Belongs to the event loop; only `Threads` run elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from baton.errors import InternalError
from kvstore.disk_health import DiskHealth
from kvstore.disk_index import DiskIndex
from kvstore.disk_open import OldSegment
from kvstore.disk_options import DiskOptions, DiskState, DiskStats
from kvstore.disk_space import Segment, Segments
from kvstore.files import Threads
from kvstore.journal import TierChanges
from kvstore.segment import segment_name
from kvstore.segment_io import Place, SegmentIo


class DiskLog:
    """The only owner of segments and of the index."""

    def __init__(
        self,
        options: DiskOptions,
        io: SegmentIo,
        threads: Threads,
        changes: TierChanges,
        health: DiskHealth,
        stats: DiskStats,
    ) -> None:
        self.io = io
        self.most = max(2, options.max_bytes // io.format.file_bytes)  # segments
        self.index = DiskIndex(self.most * io.format.records)
        self._options = options
        self._threads = threads
        self._changes = changes
        self._health = health
        self._stats = stats
        self._segments = Segments(self.most, io.format.records)
        self._current: Segment | None = None
        self._rolling = asyncio.Lock()

    def __len__(self) -> int:
        """Segments."""
        return len(self._segments)

    def use(self, direct: bool) -> None:
        self.io = replace(self.io, direct=direct)

    def adopt(self, found: Sequence[OldSegment], newest: int) -> None:
        """Segments that were there already, oldest first; `newest` is the greatest number that any
        file had."""
        for old in found:
            segment = self._segments.add(old.number, old.path, old.fd)
            segment.used = old.keys[-1][0] + 1
            for position, key in old.keys:
                self.enter(key, segment, position)
        self._segments.skip_number(newest)

    def find(self, key: bytes) -> tuple[Segment, int] | None:
        """Its segment, and the position in it."""
        location = self.index.find(key)
        return None if location is None else self._segments.at(location)

    def touch(self, segment: Segment) -> None:
        """It is used: others are given up before it."""
        self._segments.touch(segment)

    @contextlib.contextmanager
    def using(self, segment: Segment) -> Iterator[None]:
        """The segment's file stays open, whatever happens to the segment meanwhile."""
        segment.users += 1
        try:
            yield
        finally:
            segment.users -= 1
            if segment.dropped and not segment.users:
                self._close_fd(segment.fd)

    def enter(self, key: bytes, segment: Segment, position: int) -> None:
        """The newest record of a key counts."""
        before = self.index.find(key)
        if before is None:
            self._changes.add(key)
        else:
            self._segments.at(before)[0].live -= 1
        self.index.put(key, self._segments.location(segment, position))
        segment.live += 1

    def remove(self, key: bytes) -> bool:
        """Forget a block; its space comes back with its segment. Whether it was there."""
        location = self.index.remove(key)
        if location is None:
            return False
        self._segments.at(location)[0].live -= 1
        self._changes.remove(key)
        return True

    async def seal(self, segment: Segment) -> None:
        """Write the index of a segment that nobody will write to any more."""
        first = self._segments.location(segment, 0)
        live = self.index.within(first, first + segment.used)
        keys = [(location - first, key) for location, key in live]
        try:
            with self.using(segment):
                await self._threads.run(
                    self.io.seal, segment.fd, segment.number, segment.used, keys
                )
        except OSError as error:
            self._health.failed("write", error)

    async def seal_current(self) -> None:
        """At an orderly end."""
        segment, self._current = self._current, None
        if segment is not None and 0 < segment.used < self.io.format.records:
            await self.seal(segment)

    async def room(self) -> Segment | None:
        """A segment with a free position, which the caller takes before it waits for anything."""
        async with self._rolling:
            if self._health.state is not DiskState.ON:
                return None
            if self._current is None or self._current.used == self.io.format.records:
                self._current = None
                try:
                    segment = await self._next_segment()
                except OSError as error:
                    self._health.failed("write", error)
                    return None
                self._current = None if self._health.off else segment
            return self._current

    async def _next_segment(self) -> Segment | None:
        """None when the file system has too little room and there is nothing left to give up."""
        directory = self._options.directory
        while True:
            full = self._segments.full
            needed = self._options.floor_bytes + self.io.format.file_bytes
            if not full and await self._threads.run(self.io.files.free_bytes, directory) >= needed:
                break
            oldest = self._segments.oldest()
            if oldest is None:
                self._health.pause("too little space is free on the file system")
                return None
            await self._give_up(oldest)
        number = self._segments.new_number()
        path = directory / segment_name(number)
        fd = await self._threads.run(self.io.create, path, number)
        if self._health.off:  # meanwhile
            self._close_fd(fd)
            return None
        segment = self._segments.add(number, path, fd)
        if (sparse := self._segments.sparse(segment)) is not None:
            await self._move(sparse, segment)
        return segment

    async def _give_up(self, segment: Segment) -> None:
        first = self._segments.location(segment, 0)
        for _, key in self.index.within(first, first + segment.used):
            self.remove(key)
            self._stats.given_up += 1
        await self._drop(segment)

    async def _move(self, sparse: Segment, to: Segment) -> None:
        """What is alive in `sparse`, to the empty segment `to`; then its file goes."""
        first = self._segments.location(sparse, 0)
        live = self.index.within(first, first + sparse.used)
        records = [
            (Place(sparse.number, sparse.fd, location - first), key) for location, key in live
        ]
        to.used = len(records)
        try:
            with self.using(sparse), self.using(to):
                moved = await self._threads.run(self.io.copy, records, Place(to.number, to.fd, 0))
        except OSError as error:
            self._health.failed("move", error)
            return
        if self._health.off:  # meanwhile
            return
        for (location, key), result in zip(live, moved, strict=True):
            if self.index.find(key) != location:
                continue  # removed meanwhile
            if result is None:
                self._stats.damaged += 1
                self.remove(key)
            else:
                self.enter(key, to, result[1])
                self._stats.moved += 1
        await self._drop(sparse)

    async def _drop(self, segment: Segment) -> None:
        """Of a segment without live records: reads under way end as they began."""
        self._segments.remove(segment)
        segment.dropped = True
        if not segment.users:
            self._close_fd(segment.fd)
        try:
            await self._threads.run(self.io.files.unlink, segment.path)
        except OSError as error:
            self._health.failed("unlink", error)

    def clear(self) -> None:
        """Forget every block, for good; their files stay."""
        for key in list(self.index):
            self.remove(key)
        self.close()

    def close(self) -> None:
        """Each file, once nobody is at it any more."""
        for segment in list(self._segments):
            self._segments.remove(segment)
            segment.dropped = True
            if not segment.users:
                self._close_fd(segment.fd)
        self._current = None

    def check_integrity(self) -> None:
        """Raise InternalError unless index and segments agree. O(blocks)."""
        self.index.check_integrity()
        records = self.io.format.records
        live = 0
        for segment in self._segments:
            first = self._segments.location(segment, 0)
            found = self.index.within(first, first + records)
            _require(len(found) == segment.live, f"{segment.path.name} was miscounted")
            _require(
                all(location < first + segment.used for location, _ in found),
                f"{segment.path.name} has a block where none was written",
            )
            live += segment.live
        _require(live == len(self.index), "blocks are indexed that are in no segment")
        _require(self._current is None or not self._current.dropped, "writing to a dropped file")

    def _close_fd(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # nothing is synchronized, so nothing can be lost
            self.io.files.close(fd)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InternalError(f"Disk accounting is broken: {message}.")
