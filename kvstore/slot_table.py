"""The header table beside the slots in shared memory: what survives the store's process.

    header of slot n, at n * 128 of the table:

     0   4  magic "bKVs"; zeros: the slot holds nothing
     4   4  version, 1
     8  16  layout fingerprint
    24  16  key
    40  16  parent's key; zeros: unknown or none
    56   4  depth
    60   4  zeros
    64   8  generation: grows with every block that is stored, over all slots
    72   8  payload length, bytes
    80  16  xxh3_128 of the payload
    96   8  xxh3_64 of bytes 0-95
   104  24  zeros

    payload of slot n: at n * block_bytes of the payload area, which has nothing else in it

A slot is filled in this order: header zeroed, payload written, and, once it has been hashed, header
written. So whenever the process is killed, a header that verifies belongs to a payload that was
complete, and what is lost are the blocks that were being filled or waited to be hashed.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from kvstore.format import BlockInfo, seal

HEADER_BYTES = 128
_MAGIC = b"bKVs"
_VERSION = 1
_BODY = struct.Struct("<4sI16s16s16sIIQQ16s")
_SEALED_BYTES = _BODY.size + 8
_BLANK = bytes(HEADER_BYTES)


@dataclass(frozen=True, slots=True)
class StoredSlot:
    info: BlockInfo
    generation: int


class SlotTable:
    """Headers in a writable buffer of HEADER_BYTES for each slot. Says nothing about payloads."""

    def __init__(self, buffer: memoryview, fingerprint: bytes, block_bytes: int) -> None:
        self._buffer = buffer
        self._fingerprint = fingerprint
        self._block_bytes = block_bytes

    def __len__(self) -> int:
        return self._buffer.nbytes // HEADER_BYTES

    def clear(self, slot: int) -> None:
        start = slot * HEADER_BYTES
        self._buffer[start : start + HEADER_BYTES] = _BLANK

    def write(self, slot: int, info: BlockInfo, generation: int) -> None:
        """The header must be blank."""
        body = _BODY.pack(
            _MAGIC,
            _VERSION,
            self._fingerprint,
            info.key,
            info.parent,
            info.depth,
            0,
            generation,
            self._block_bytes,
            info.checksum,
        )
        start = slot * HEADER_BYTES
        self._buffer[start : start + _SEALED_BYTES] = body + seal(body)

    def read(self, slot: int) -> StoredSlot | None:
        """None for a header that is empty, torn, or of another version, layout or block size."""
        start = slot * HEADER_BYTES
        data = bytes(self._buffer[start : start + HEADER_BYTES])
        body = data[: _BODY.size]
        if data[_BODY.size : _BODY.size + 8] != seal(body):
            return None
        magic, version, layout, key, parent, depth, _, generation, length, checksum = _BODY.unpack(
            body
        )
        if (magic, version, layout, length) != (
            _MAGIC,
            _VERSION,
            self._fingerprint,
            self._block_bytes,
        ):
            return None
        return StoredSlot(BlockInfo(key, depth, parent, checksum), generation)


def map_file(path: Path, nbytes: int) -> mmap.mmap:
    """A named file of that size (made or resized; new bytes are zero), mapped shared and writable.

    For private use of one user: mode 0600. Raises OSError.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, nbytes)
        return mmap.mmap(fd, nbytes)
    finally:
        os.close(fd)
