"""The NVMe tier: an append-only log of checksummed records, found again after a restart.

    write    queue -> writers -> one pwritev of many records -> index
    read     index -> preadv into the caller's buffer -> checksums -> caller
    room     by whole segments, see `disk_log`

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
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from baton.errors import ConfigError
from baton.types.fleet import KvLayout
from kvstore.disk_health import DiskHealth
from kvstore.disk_log import DiskLog
from kvstore.disk_open import find_segments
from kvstore.disk_options import DiskOptions, DiskState, DiskStats
from kvstore.disk_space import Segment
from kvstore.files import FileOps, OsFiles, ThreadPool, Threads
from kvstore.format import ALIGN, BlockInfo, fingerprint
from kvstore.journal import TierChanges
from kvstore.segment import SegmentFormat, number_of
from kvstore.segment_io import MAX_BATCH, Place, SegmentIo

log = logging.getLogger(__name__)

WRITERS = 2  # while one batch is written, the next is made


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
        self.block_bytes = layout.block_bytes
        self.format = SegmentFormat(
            fingerprint(layout), layout.describe(), layout.block_bytes, options.segment_bytes
        )
        self._options = options
        self._files = files or OsFiles()
        self._threads = threads or ThreadPool(options.threads, "kvstore disk")
        self._health = DiskHealth(options, self.stats, self._refuse_queued, self._end)
        io = SegmentIo(self.format, self._files, options.direct)
        self._log = DiskLog(options, io, self._threads, changes, self._health, self.stats)
        self._queue: asyncio.Queue[_Write] = asyncio.Queue()
        self._writers: list[asyncio.Task[None]] = []
        self._lock_fd = -1

    @property
    def state(self) -> DiskState:
        return self._health.state

    @property
    def why(self) -> str:
        """The tier is paused or off, when it is."""
        return self._health.why

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is in use; known after `open`."""
        return self._log.io.direct

    @property
    def index_bytes(self) -> int:
        return self._log.index.nbytes

    @property
    def capacity(self) -> int:
        """Blocks."""
        return self._log.index.locations

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and key in self._log.index

    def __len__(self) -> int:
        return len(self._log.index)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._log.index)

    async def open(self) -> None:
        """Find what is there and start to write. A disk that fails leaves the tier OFF.

        Raises ConfigError when another store uses the directory, and LayoutMismatch when it has
        blocks of another layout.
        """
        self._threads.open()
        try:
            await self._open()
        except OSError as error:
            self._health.cannot_begin(error)
        except BaseException:
            await self.close()
            raise
        else:
            self._health.begin()
            self._writers = [asyncio.create_task(self._write_loop()) for _ in range(WRITERS)]

    async def close(self) -> None:
        """Wait for what is being read and written, and refuse what was queued. Idempotent."""
        for writer in self._writers:
            writer.cancel()
        await asyncio.gather(*self._writers, return_exceptions=True)
        self._writers.clear()
        await self._log.seal_current()
        self._health.end()
        self._refuse_queued()
        self._threads.close()
        self._log.close()
        if self._lock_fd >= 0:
            with suppress(OSError):
                self._files.close(self._lock_fd)
            self._lock_fd = -1

    async def write(self, info: BlockInfo, payload: memoryview) -> bool:
        """Whether the block is on disk now. The payload must not change until this has returned;
        its address should be a multiple of ALIGN. Never raises for a disk that fails.

        The caller must not write one key twice at a time.
        """
        if info.key in self._log.index:
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
        places: list[tuple[Place, bytes, memoryview]] = []
        segments: list[Segment] = []
        results: list[BlockInfo | OSError | None] = []
        with ExitStack() as used:
            for key, into in wanted:
                found = None if self._health.off else self._log.find(key)
                if found is not None:
                    segment, position = found
                    self._log.touch(segment)
                    used.enter_context(self._log.using(segment))
                    segments.append(segment)
                    places.append((Place(segment.number, segment.fd, position), key, into))
            if places:
                results = await self._threads.run(self._log.io.read_many, places)
        infos: dict[bytes, BlockInfo | None] = {}
        for (place, key, _), segment, result in zip(places, segments, results, strict=True):
            infos[key] = self._judge(key, segment, place.position, result)
        return [infos.get(key) for key, _ in wanted]

    def _judge(
        self, key: bytes, segment: Segment, position: int, result: BlockInfo | OSError | None
    ) -> BlockInfo | None:
        """Count what a read gave, and forget what is damaged."""
        if isinstance(result, OSError):
            self._health.failed("read", result)
            return None
        if result is not None:
            self.stats.read += 1
            return result
        self.stats.damaged += 1
        log.warning("A damaged block in %s was forgotten.", segment.path.name)
        if self._log.find(key) == (segment, position):
            self.remove(key)
        return None

    def remove(self, key: bytes) -> bool:
        """Forget a block; its space comes back with its segment. Whether it was there."""
        return self._log.remove(key)

    def check_integrity(self) -> None:
        """Raise InternalError unless index and segments agree. O(blocks)."""
        self._log.check_integrity()

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
            self._log.use(await self._can_be_direct())
        numbers = sorted(number for number in map(number_of, names) if number is not None)
        room = self._log.most - 1  # one place is for what is written next
        found = await find_segments(self._log.io, self._threads, directory, numbers, room)
        if numbers:
            self._log.adopt(found, numbers[-1])
            log.info("Found %d blocks in %d segments", len(self), len(found))

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
                self._health.turn_off("writing failed: see the log of the store")
            finally:
                for item in batch:
                    if not item.done.done():
                        item.done.set_result(False)

    async def _write_all(self, batch: list[_Write]) -> None:
        """Settles every item, one segment after the other."""
        while batch:
            segment = await self._log.room()
            if segment is None:
                self.stats.refused += len(batch)
                return
            first = segment.used
            part = batch[: self.format.records - first]
            batch = batch[len(part) :]
            segment.used += len(part)
            await self._write_part(segment, first, part)

    async def _write_part(self, segment: Segment, first: int, part: list[_Write]) -> None:
        self._log.touch(segment)
        place = Place(segment.number, segment.fd, first)
        records = [(item.info, item.payload) for item in part]
        stored = False
        segment.writers += 1
        with self._log.using(segment):
            try:
                await self._threads.run(self._log.io.write, place, records)
                stored = not (segment.dropped or self._health.off)
            except OSError as error:
                self._health.failed("write", error)
                self.stats.refused += len(part)
            finally:
                segment.writers -= 1
        for n, item in enumerate(part):
            if stored:
                self._log.enter(item.info.key, segment, first + n)
                self.stats.written += 1
            item.done.set_result(stored)
        full = segment.used == self.format.records and not segment.writers
        if full and not (segment.dropped or self._health.off):
            await self._log.seal(segment)

    def _refuse_queued(self) -> None:
        while not self._queue.empty():
            self.stats.refused += 1
            self._queue.get_nowait().done.set_result(False)

    def _end(self) -> None:
        """The disk fails too often: hold nothing any more."""
        self._log.clear()
        self._refuse_queued()
