"""What a segment holds, in one place at its end: opening reads that instead of every header.

    behind the last record of a segment that grows no more:

         *  entries, 20 bytes each, by position
              0   4  position of a record in the segment
              4  16  its key
            padded with zeros to a multiple of 4096
         *  trailer, the last 4096 bytes of the file
              0   8  magic "batonKVi"
              8   4  version, 1
             12   4  positions that the segment has, written or not
             16  16  layout fingerprint
             32   8  number of the segment
             40   8  payload length of every record, bytes
             48   4  number of entries
             52   4  zeros
             56  16  xxh3_128 of the entries, padding included
             72   8  xxh3_64 of bytes 0-71
             80   -  zeros

It only saves time: a segment without a whole index is scanned, and every record says itself what it
is when it is read. Version 1 of segments was there before it, and is read and written as ever.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvstore.format import ALIGN, checksum, padded, seal

_MAGIC = b"batonKVi"
_VERSION = 1
_TRAILER = struct.Struct("<8sII16sQQII16s")
_ENTRY = struct.Struct("<I16s")
_SEAL_BYTES = 8

Keys = tuple[tuple[int, bytes], ...]
"""(position, key), by position."""


@dataclass(frozen=True, slots=True)
class Trailer:
    used: int  # positions
    entries: int
    digest: bytes

    @property
    def entries_bytes(self) -> int:
        return entries_bytes(self.entries)


def entries_bytes(count: int) -> int:
    return padded(count * _ENTRY.size)


@dataclass(frozen=True, slots=True)
class IndexCodec:
    """Of one segment."""

    fingerprint: bytes
    number: int
    block_bytes: int

    def pack(self, used: int, keys: Sequence[tuple[int, bytes]]) -> bytes:
        """Entries and trailer of a segment with `used` positions."""
        entries = b"".join(_ENTRY.pack(position, key) for position, key in keys)
        entries = entries.ljust(entries_bytes(len(keys)), b"\0")
        body = self._pack_trailer(Trailer(used, len(keys), checksum(memoryview(entries))))
        return entries + (body + seal(body)).ljust(ALIGN, b"\0")

    def parse_trailer(self, page: bytes) -> Trailer | None:
        """None unless it is a whole trailer of this segment."""
        body = page[: _TRAILER.size]
        if page[_TRAILER.size : _TRAILER.size + _SEAL_BYTES] != seal(body):
            return None
        _, _, used, _, _, _, entries, _, digest = _TRAILER.unpack(body)
        trailer = Trailer(used, entries, digest)
        return trailer if body == self._pack_trailer(trailer) else None

    def _pack_trailer(self, trailer: Trailer) -> bytes:
        return _TRAILER.pack(
            _MAGIC,
            _VERSION,
            trailer.used,
            self.fingerprint,
            self.number,
            self.block_bytes,
            trailer.entries,
            0,
            trailer.digest,
        )


def parse_entries(data: memoryview, trailer: Trailer) -> Keys | None:
    """None unless they are those that the trailer was written with, and possible: a position that
    the segment does not have would be one of another segment, and one that comes twice two blocks
    in one place."""
    if checksum(data) != trailer.digest:
        return None
    keys: Keys = tuple(_ENTRY.iter_unpack(data[: trailer.entries * _ENTRY.size]))
    rising = all(one[0] < next_one[0] for one, next_one in pairwise(keys))
    return keys if rising and keys[-1][0] < trailer.used else None
