"""The NVMe tier: an append-only log of checksummed records, found again after a restart.

    write    queue -> writers -> one pwritev of many records -> index
    read     index -> preadv into the caller's buffer -> checksums -> caller
    room     a new segment costs the segment that was used longest ago; while one is emptier than
             half, what is left of it is moved to the new one

Nothing that is not verified is ever returned: a damaged record is forgotten. The tier lives with a
disk that does not:

    ON       reads and writes
    PAUSED   the disk is full: reads only; tried again after `pause_s`
    OFF      it failed too often: holds nothing until the process is started again

Deleting changes memory only, so a deleted block may be back after a restart; its bytes are still
those of its key. Belongs to the event loop; only `Threads` run elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from baton.errors import ConfigError, InternalError
from baton.types.fleet import KvLayout
from kvstore.disk_index import DiskIndex
from kvstore.disk_open import find_segments
from kvstore.disk_options import DiskOptions, DiskState, DiskStats
from kvstore.disk_space import Segment, Segments
from kvstore.files import FileOps, OsFiles, ThreadPool, Threads
from kvstore.format import ALIGN, BlockInfo, fingerprint
from kvstore.journal import TierChanges
from kvstore.segment import SegmentFormat, number_of, segment_name
from kvstore.segment_io import MAX_BATCH, Place, SegmentIo

log = logging.getLogger(__name__)

WRITERS = 2  # while one batch is written, the next is made
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class _Write:
    info: BlockInfo
    payload: memoryview
    done: asyncio.Future[bool]


class DiskTier:
    def __init__(
        self,
        options: DiskOptions,
        layout: KvLayout,
        changes: TierChanges,
        files: FileOps | None = None,
        threads: Threads | None = None,
    ) -> None:
        self.stats = DiskStats()
        self.why = ""  # the tier is paused or off, when it is
        self.block_bytes = layout.block_bytes
        self.format = SegmentFormat(
            fingerprint(layout), layout.describe(), layout.block_bytes, options.segment_bytes
        )
        self._options = options
        self._changes = changes
        self._files = files or OsFiles()
        self._threads = threads or ThreadPool(options.threads, "kvstore disk")
        self._io = SegmentIo(self.format, self._files, options.direct)
        most = max(2, options.max_bytes // self.format.file_bytes)
        self._segments = Segments(most, self.format.records)
        self._index = DiskIndex(most * self.format.records)
        self._current: Segment | None = None
        self._rolling = asyncio.Lock()
        self._queue: asyncio.Queue[_Write] = asyncio.Queue()
        self._writers: list[asyncio.Task[None]] = []
        self._lock_fd = -1
        self._off = True
        self._resume_at = 0.0
        self._strikes = 0  # failures other than a full disk

    @property
    def state(self) -> DiskState:
        if self._off:
            return DiskState.OFF
        paused = asyncio.get_running_loop().time() < self._resume_at
        return DiskState.PAUSED if paused else DiskState.ON

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is in use; known after `open`."""
        return self._io.direct

    @property
    def index_bytes(self) -> int:
        return self._index.nbytes

    @property
    def capacity(self) -> int:
        """Blocks."""
        return self._index.locations

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and key in self._index

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._index)

    async def open(self) -> None:
        """Find what is there and start to write. A disk that fails leaves the tier OFF.

        Raises ConfigError when another store uses the directory, and LayoutMismatch when it has
        blocks of another layout.
        """
        self._threads.open()
        try:
            await self._open()
        except OSError as error:
            self.why = str(error)
            log.error(
                "The NVMe tier in %s is off: %s. Serving goes on without it; make the directory "
                "usable and start the store again",
                self._options.directory,
                error,
            )
            self.stats.errors += 1
        except BaseException:
            await self.close()
            raise
        else:
            self._off = False
            self._writers = [asyncio.create_task(self._write_loop()) for _ in range(WRITERS)]

    async def close(self) -> None:
        """Wait for what is being read and written, and refuse what was queued. Idempotent."""
        for writer in self._writers:
            writer.cancel()
        await asyncio.gather(*self._writers, return_exceptions=True)
        self._writers.clear()
        self._off = True
        self._refuse_queued()
        self._threads.close()
        for segment in list(self._segments):
            self._segments.remove(segment)
            self._close_fd(segment.fd)
        self._current = None
        if self._lock_fd >= 0:
            self._close_fd(self._lock_fd)
            self._lock_fd = -1

    async def write(self, info: BlockInfo, payload: memoryview) -> bool:
        """Whether the block is on disk now. The payload must not change until this has returned;
        its address should be a multiple of ALIGN. Never raises for a disk that fails.

        The caller must not write one key twice at a time.
        """
        if info.key in self._index:
            return True
        if self.state is not DiskState.ON:
            self.stats.refused += 1
            return False
        item = _Write(info, payload, asyncio.get_running_loop().create_future())
        self._queue.put_nowait(item)
        try:
            return await asyncio.shield(item.done)
        except asyncio.CancelledError:
            await asyncio.wait([item.done])  # a thread may be reading the payload
            raise

    async def read_many(self, wanted: Sequence[tuple[bytes, memoryview]]) -> list[BlockInfo | None]:
        """Blocks, verified, each into its buffer (of `block_bytes`; address a multiple of ALIGN),
        by one thread. None: not stored, damaged or not readable; its buffer may have any bytes.

        Nothing writes to the buffers any more when this returns, raises or is cancelled.
        """
        found = [(key, into, self._index.find(key)) for key, into in wanted]
        places: list[tuple[Place, bytes, memoryview]] = []
        segments: list[Segment] = []
        for key, into, location in found:
            if location is not None and not self._off:
                segment, position = self._segments.at(location)
                self._segments.touch(segment)
                segment.users += 1
                segments.append(segment)
                places.append((Place(segment.number, segment.fd, position), key, into))
        try:
            results = await self._threads.run(self._io.read_many, places) if places else []
        finally:
            for segment in segments:
                self._leave(segment)
        infos: dict[bytes, BlockInfo | None] = {}
        for (place, key, _), segment, result in zip(places, segments, results, strict=True):
            infos[key] = self._judge(key, segment, place.position, result)
        return [infos.get(key) for key, _ in wanted]

    def _judge(
        self, key: bytes, segment: Segment, position: int, result: BlockInfo | OSError | None
    ) -> BlockInfo | None:
        """Count what a read gave, and forget what is damaged."""
        if isinstance(result, OSError):
            self._failed("read", result)
            return None
        if result is not None:
            self.stats.read += 1
            return result
        self.stats.damaged += 1
        log.warning("A damaged block in %s was forgotten.", segment.path.name)
        location = self._segments.location(segment, position)
        if not segment.dropped and self._index.find(key) == location:
            self.remove(key)
        return None

    def remove(self, key: bytes) -> bool:
        """Forget a block; its space comes back with its segment. Whether it was there."""
        location = self._index.remove(key)
        if location is None:
            return False
        self._segments.at(location)[0].live -= 1
        self._changes.remove(key)
        return True

    def check_integrity(self) -> None:
        """Raise InternalError unless index and segments agree. O(blocks)."""
        self._index.check_integrity()
        records = self.format.records
        live = 0
        for segment in self._segments:
            first = self._segments.location(segment, 0)
            found = self._index.within(first, first + records)
            _require(len(found) == segment.live, f"{segment.path.name} was miscounted")
            _require(
                all(location < first + segment.used for location, _ in found),
                f"{segment.path.name} has a block where none was written",
            )
            live += segment.live
        _require(live == len(self._index), "blocks are indexed that are in no segment")
        _require(self._current is None or not self._current.dropped, "writing to a dropped file")

    # Opening

    async def _open(self) -> None:
        directory = self._options.directory
        names = await self._threads.run(self._files.names, directory)
        try:
            self._lock_fd = await self._threads.run(self._files.lock, directory / "lock")
        except BlockingIOError:
            raise ConfigError(
                f"{directory} is in use by another store; give each its own directory"
            ) from None
        if self._options.direct:
            self._io = replace(self._io, direct=await self._can_be_direct())
        numbers = sorted(number for number in map(number_of, names) if number is not None)
        room = self._segments.most - 1  # one place is for what is written next
        for old in await find_segments(self._io, self._threads, directory, numbers, room):
            segment = self._segments.add(old.number, old.path, old.fd)
            segment.used = old.keys[-1][0] + 1
            for position, key in old.keys:
                self._enter(key, segment, position)
        if numbers:
            self._segments.skip_number(numbers[-1])
            log.info("Found %d blocks in %d segments", len(self), len(self._segments))

    async def _can_be_direct(self) -> bool:
        if self.block_bytes % ALIGN:
            log.info("Blocks of %d bytes are not aligned: buffered I/O", self.block_bytes)
            return False
        if await self._threads.run(self._files.allows_direct, self._options.directory):
            return True
        log.info("%s has no O_DIRECT: buffered I/O", self._options.directory)
        return False

    # Writing

    async def _write_loop(self) -> None:
        while True:
            batch = [await self._queue.get()]
            most = max(1, min(MAX_BATCH, self._options.batch_bytes // self.format.stride))
            while len(batch) < most and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            try:
                await self._write_all(batch)
            except Exception:
                log.exception("Writing to NVMe failed in a way that nobody thought of.")
                self._turn_off("writing failed: see the log of the store")
            finally:
                for item in batch:
                    if not item.done.done():
                        item.done.set_result(False)

    async def _write_all(self, batch: list[_Write]) -> None:
        """Settles every item, one segment after the other."""
        while batch:
            segment = await self._room()
            if segment is None:
                self.stats.refused += len(batch)
                return
            first = segment.used
            part = batch[: self.format.records - first]
            batch = batch[len(part) :]
            segment.used += len(part)
            await self._write_part(segment, first, part)

    async def _write_part(self, segment: Segment, first: int, part: list[_Write]) -> None:
        self._segments.touch(segment)
        segment.users += 1
        stored = False
        try:
            place = Place(segment.number, segment.fd, first)
            await self._threads.run(self._io.write, place, [(i.info, i.payload) for i in part])
            stored = True
        except OSError as error:
            self._failed("write", error)
            self.stats.refused += len(part)
        finally:
            gone = segment.dropped or self._off
            self._leave(segment)
        for n, item in enumerate(part):
            if stored and not gone:
                self._enter(item.info.key, segment, first + n)
                self.stats.written += 1
            item.done.set_result(stored and not gone)

    def _enter(self, key: bytes, segment: Segment, position: int) -> None:
        """The newest record of a key counts."""
        before = self._index.find(key)
        if before is None:
            self._changes.add(key)
        else:
            self._segments.at(before)[0].live -= 1
        self._index.put(key, self._segments.location(segment, position))
        segment.live += 1

    async def _room(self) -> Segment | None:
        """A segment with a free position, which the caller takes before it waits for anything."""
        async with self._rolling:
            if self.state is not DiskState.ON:
                return None
            if self._current is None or self._current.used == self.format.records:
                self._current = None
                try:
                    segment = await self._next_segment()
                except OSError as error:
                    self._failed("write", error)
                    return None
                self._current = None if self._off else segment
            return self._current

    async def _next_segment(self) -> Segment | None:
        """None when the file system has too little room and there is nothing left to give up."""
        directory = self._options.directory
        while True:
            full = self._segments.full
            needed = self._options.floor_bytes + self.format.file_bytes
            if not full and await self._threads.run(self._files.free_bytes, directory) >= needed:
                break
            oldest = self._segments.oldest()
            if oldest is None:
                self._pause("too little space is free on the file system")
                return None
            await self._give_up(oldest)
        number = self._segments.new_number()
        path = directory / segment_name(number)
        fd = await self._threads.run(self._io.create, path, number)
        if self._off:  # meanwhile
            self._close_fd(fd)
            return None
        segment = self._segments.add(number, path, fd)
        if (sparse := self._segments.sparse(segment)) is not None:
            await self._move(sparse, segment)
        return segment

    async def _give_up(self, segment: Segment) -> None:
        first = self._segments.location(segment, 0)
        for _, key in self._index.within(first, first + segment.used):
            self.remove(key)
            self.stats.given_up += 1
        await self._drop(segment)

    async def _move(self, sparse: Segment, to: Segment) -> None:
        """What is alive in `sparse`, to the empty segment `to`; then its file goes."""
        first = self._segments.location(sparse, 0)
        live = self._index.within(first, first + sparse.used)
        records = [
            (Place(sparse.number, sparse.fd, location - first), key) for location, key in live
        ]
        sparse.users += 1
        to.users += 1
        to.used = len(records)
        try:
            moved = await self._threads.run(self._io.copy, records, Place(to.number, to.fd, 0))
        except OSError as error:
            self._failed("move", error)
            return
        finally:
            self._leave(sparse)
            self._leave(to)
        if self._off:  # meanwhile
            return
        for (location, key), result in zip(live, moved, strict=True):
            if self._index.find(key) != location:
                continue  # removed meanwhile
            if result is None:
                self.stats.damaged += 1
                self.remove(key)
            else:
                self._enter(key, to, result[1])
                self.stats.moved += 1
        await self._drop(sparse)

    async def _drop(self, segment: Segment) -> None:
        """Of a segment without live records: reads under way end as they began."""
        self._segments.remove(segment)
        segment.dropped = True
        if not segment.users:
            self._close_fd(segment.fd)
        try:
            await self._threads.run(self._files.unlink, segment.path)
        except OSError as error:
            self._failed("unlink", error)

    def _leave(self, segment: Segment) -> None:
        segment.users -= 1
        if segment.dropped and not segment.users:
            self._close_fd(segment.fd)

    def _close_fd(self, fd: int) -> None:
        with contextlib.suppress(OSError):  # nothing is synchronized, so nothing can be lost
            self._files.close(fd)

    # Failing

    def _failed(self, what: str, error: OSError) -> None:
        self.stats.errors += 1
        if error.errno in _FULL:
            self._pause(str(error))
            return
        log.warning("The NVMe tier could not %s: %s", what, error)
        self._strikes += 1
        if self._strikes >= self._options.error_limit and not self._off:
            self._turn_off(f"{self._strikes} errors, the last: {error}")

    def _pause(self, why: str) -> None:
        self.stats.pauses += 1
        self._resume_at = asyncio.get_running_loop().time() + self._options.pause_s
        self.why = why
        log.warning(
            "The NVMe tier in %s takes no blocks for %g s: %s. Make room there, or give the store "
            "a smaller --disk-gib",
            self._options.directory,
            self._options.pause_s,
            why,
        )
        self._refuse_queued()

    def _turn_off(self, why: str) -> None:
        self.why = why
        log.error(
            "The NVMe tier in %s is off: %s. Serving goes on without it; check the disk and start "
            "the store again",
            self._options.directory,
            why,
        )
        self._off = True
        for key in list(self._index):
            self.remove(key)
        self._current = None
        for segment in list(self._segments):
            self._segments.remove(segment)
            segment.dropped = True
            if not segment.users:
                self._close_fd(segment.fd)
        self._refuse_queued()

    def _refuse_queued(self) -> None:
        while not self._queue.empty():
            self.stats.refused += 1
            self._queue.get_nowait().done.set_result(False)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InternalError(f"Disk accounting is broken: {message}.")
