"""Reading and writing segments. Everything here blocks, raises OSError, and runs in threads."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.files import FileOps
from kvstore.format import ALIGN, BlockInfo, checksum, padded
from kvstore.segment import SegmentFormat, SegmentHeader, parse_header
from kvstore.segment_index import Keys, parse_entries

_IOV_MAX = 1024  # buffers of one call, on Linux
MAX_BATCH = _IOV_MAX // 3  # records: header, payload, padding


@dataclass(frozen=True, slots=True)
class Place:
    """A record's: segment number, open file, position in it."""

    number: int
    fd: int
    position: int


@dataclass(frozen=True, slots=True)
class Scanned:
    """An old segment, opened. `keys` are those of its index, or of records with a whole header."""

    fd: int
    header: SegmentHeader | None  # None: damaged
    keys: Keys


@dataclass(frozen=True, slots=True)
class SegmentIo:
    """Knows no state but the format: any number of threads may use one."""

    format: SegmentFormat
    files: FileOps
    direct: bool

    def create(self, path: Path, number: int) -> int:
        fd = self.files.create(path, self.format.file_bytes, self.direct)
        try:
            self.files.write(fd, [_aligned(self.format.pack_header(number))], 0)
        except OSError:
            self.files.close(fd)
            self.files.unlink(path)
            raise
        return fd

    def write(self, place: Place, batch: Sequence[tuple[BlockInfo, memoryview]]) -> None:
        """Records from `place` on, at most MAX_BATCH, in one call."""
        headers = _aligned(
            b"".join(
                self.format.pack_record(info, place.number, place.position + n)
                for n, (info, _) in enumerate(batch)
            )
        )
        padding = memoryview(bytes(self.format.padding))
        buffers: list[memoryview] = []
        for n, (_, payload) in enumerate(batch):
            buffers += headers[n * ALIGN : (n + 1) * ALIGN], payload
            if padding:
                buffers.append(padding)
        self.files.write(place.fd, buffers, self.format.offset(place.position))

    def read_many(
        self, wanted: Sequence[tuple[Place, bytes, memoryview]]
    ) -> list[BlockInfo | OSError | None]:
        """What `read` returns or raises for each, one after the other."""
        page = _page()
        results: list[BlockInfo | OSError | None] = []
        for place, key, into in wanted:
            try:
                results.append(self.read(place, key, into, page))
            except OSError as error:
                results.append(error)
        return results

    def read(
        self, place: Place, key: bytes, into: memoryview, page: memoryview
    ) -> BlockInfo | None:
        """The payload, verified, into `into`. None when it is damaged or another block's: then
        `into` has any bytes. `page` is room for a header."""
        offset = self.format.offset(place.position)
        got = self.files.read(place.fd, [page, into], offset)
        if got != ALIGN + into.nbytes:
            return None
        info = self.format.parse_record(bytes(page), place.number, place.position)
        if info is None or info.key != key or checksum(into) != info.checksum:
            return None
        return info

    def copy(
        self, records: Sequence[tuple[Place, bytes]], to: Place
    ) -> list[tuple[bytes, int] | None]:
        """Move records of one segment to `to` and what follows it: (key, position there) of each,
        None for those that cannot be read. One at a time: memory for one block."""
        buffer = memoryview(mmap.mmap(-1, padded(self.format.block_bytes)))
        payload = buffer[: self.format.block_bytes]
        position = to.position
        moved: list[tuple[bytes, int] | None] = []
        for place, key in records:
            (info,) = self.read_many([(place, key, payload)])
            if not isinstance(info, BlockInfo):
                moved.append(None)
                continue
            self.write(Place(to.number, to.fd, position), [(info, payload)])
            moved.append((key, position))
            position += 1
        return moved

    def seal(self, fd: int, number: int, used: int, keys: Sequence[tuple[int, bytes]]) -> None:
        """Nothing more is written to the segment: put its index behind the first `used` positions,
        and end the file there. `keys` are (position, key)."""
        index = self.format.index(number).pack(used, keys)
        self.files.write(fd, [_aligned(index)], self.format.offset(used))
        self.files.truncate(fd, self.format.offset(used) + len(index))

    def scan(self, path: Path) -> Scanned:
        """Open an old segment. One without an index, because its process was killed, gets one, and
        what was not written yet is cut off."""
        fd = self.files.open(path, self.direct)
        try:
            page = _page()
            if self.files.read(fd, [page], 0) != ALIGN:
                return Scanned(fd, None, ())
            header = parse_header(bytes(page))
            if header is None or header.fingerprint != self.format.fingerprint:
                return Scanned(fd, header, ())
            keys = self._read_index(fd, header.number, page)
            if keys is None:
                keys = tuple(self._scan_records(fd, header.number, page))
                used = keys[-1][0] + 1 if keys else 0
                self.files.truncate(fd, self.format.offset(used))
                with contextlib.suppress(OSError):  # it is scanned again the next time
                    self.seal(fd, header.number, used, keys)
            return Scanned(fd, header, keys)
        except OSError:
            self.files.close(fd)
            raise

    def _read_index(self, fd: int, number: int, page: memoryview) -> Keys | None:
        """None when it has none that is whole."""
        size = self.files.size(fd)
        if size < 2 * ALIGN or size % ALIGN:
            return None
        if self.files.read(fd, [page], size - ALIGN) != ALIGN:
            return None
        trailer = self.format.index(number).parse_trailer(bytes(page))
        if trailer is None or trailer.used > self.format.records:
            return None
        offset = self.format.offset(trailer.used)
        if not trailer.entries or size != offset + trailer.entries_bytes + ALIGN:
            return None
        entries = memoryview(mmap.mmap(-1, trailer.entries_bytes))
        if self.files.read(fd, [entries], offset) != entries.nbytes:
            return None
        return parse_entries(entries, trailer)

    def _scan_records(self, fd: int, number: int, page: memoryview) -> list[tuple[int, bytes]]:
        size = self.files.size(fd)
        keys = []
        for position in range(self.format.records):
            if self.format.offset(position + 1) > size:
                break  # torn: its payload is not all there
            if self.files.read(fd, [page], self.format.offset(position)) != ALIGN:
                break
            info = self.format.parse_record(bytes(page), number, position)
            if info is not None:
                keys.append((position, info.key))
        return keys


def _page() -> memoryview:
    """A page for a header, aligned for O_DIRECT; as cheap as a buffer that is kept."""
    return memoryview(mmap.mmap(-1, ALIGN))


def _aligned(data: bytes) -> memoryview:
    area = memoryview(mmap.mmap(-1, len(data)))
    area[:] = data
    return area
