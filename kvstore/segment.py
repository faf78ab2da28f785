"""The files of the NVMe tier, byte by byte. A directory has `lock` and segments, which only grow:

    segment-0000000000000007.kv

         0  segment header, 4096 bytes
              0   8  magic "batonKVs"
              8   4  version, 1
             12   4  zeros
             16  16  layout fingerprint
             32   8  number of the segment, as in its name; grows from file to file
             40   8  payload length of every record, bytes
             48   2  length of the text that follows
             50   *  the layout, for people and for error messages (UTF-8)
              ...    zeros
           4088   8  xxh3_64 of bytes 0-4087
      4096  record 0: header, 4096 bytes
              0   8  magic "batonKVr"
              8   4  version, 1
             12   4  depth
             16   8  sequence number: segment number * 2^24 + position in the segment
             24  16  layout fingerprint
             40  16  key
             56  16  parent's key; zeros: unknown or none
             72   8  payload length, bytes
             80  16  xxh3_128 of the payload
             96   8  xxh3_64 of bytes 0-95
            104   -  zeros
            followed by the payload, padded with zeros to a multiple of 4096
         *  record 1, 2, ... all of the same length, so that a damaged one hides no other
         *  index, when nothing more is written to the segment: see `segment_index`

A segment is made at its full length. What was never written is zeros, which no header is. Nothing
is synchronized to the medium: a record that was not there yet when power was lost does not verify.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

from kvstore.format import ALIGN, BlockInfo, padded, seal
from kvstore.segment_index import IndexCodec, entries_bytes

_SEGMENT_MAGIC, _RECORD_MAGIC = b"batonKVs", b"batonKVr"
_VERSION = 1
_SEGMENT = struct.Struct("<8sII16sQQH")
_RECORD = struct.Struct("<8sIIQ16s16s16sQ16s")
_SEAL_BYTES = 8
_NAME = re.compile(r"segment-(\d{16})\.kv")
MAX_RECORDS = 1 << 24


def segment_name(number: int) -> str:
    return f"segment-{number:016d}.kv"


def number_of(name: str) -> int | None:
    """The inverse of `segment_name`; None for any other file."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    version: int
    fingerprint: bytes
    number: int
    block_bytes: int
    layout: str


@dataclass(frozen=True, slots=True)
class SegmentFormat:
    """The geometry and codec of segments of one layout."""

    fingerprint: bytes
    layout: str  # for people
    block_bytes: int
    segment_bytes: int  # at most, header included; the index comes on top

    @property
    def stride(self) -> int:
        """Bytes from one record to the next."""
        return ALIGN + padded(self.block_bytes)

    @property
    def padding(self) -> int:
        return padded(self.block_bytes) - self.block_bytes

    @property
    def records(self) -> int:
        """That a segment has room for; at least one, however small `segment_bytes` is."""
        return min(MAX_RECORDS, max(1, (self.segment_bytes - ALIGN) // self.stride))

    @property
    def file_bytes(self) -> int:
        """With its index, when it is full."""
        return self.offset(self.records) + entries_bytes(self.records) + ALIGN

    def index(self, number: int) -> IndexCodec:
        return IndexCodec(self.fingerprint, number, self.block_bytes)

    def offset(self, position: int) -> int:
        """Of a record in its file."""
        return ALIGN + position * self.stride

    def pack_header(self, number: int) -> bytes:
        text = self.layout.encode()[: ALIGN - _SEGMENT.size - _SEAL_BYTES]
        fixed = _SEGMENT.pack(
            _SEGMENT_MAGIC, _VERSION, 0, self.fingerprint, number, self.block_bytes, len(text)
        )
        body = (fixed + text).ljust(ALIGN - _SEAL_BYTES, b"\0")
        return body + seal(body)

    def pack_record(self, info: BlockInfo, number: int, position: int) -> bytes:
        """A record's header."""
        body = _RECORD.pack(
            _RECORD_MAGIC,
            _VERSION,
            info.depth,
            _sequence(number, position),
            self.fingerprint,
            info.key,
            info.parent,
            self.block_bytes,
            info.checksum,
        )
        return (body + seal(body)).ljust(ALIGN, b"\0")

    def parse_record(self, data: bytes, number: int, position: int) -> BlockInfo | None:
        """None unless it is a whole header of this layout that was written to this very place."""
        body = data[: _RECORD.size]
        if data[_RECORD.size : _RECORD.size + _SEAL_BYTES] != seal(body):
            return None
        magic, version, depth, sequence, layout, key, parent, length, checksum = _RECORD.unpack(
            body
        )
        expected = (
            _RECORD_MAGIC,
            _VERSION,
            _sequence(number, position),
            self.fingerprint,
            self.block_bytes,
        )
        if (magic, version, sequence, layout, length) != expected:
            return None
        return BlockInfo(key, depth, parent, checksum)


def parse_header(data: bytes) -> SegmentHeader | None:
    """None for what is no whole segment header of any version or layout."""
    body = data[: ALIGN - _SEAL_BYTES]
    if len(data) != ALIGN or data[-_SEAL_BYTES:] != seal(body):
        return None
    magic, version, _, layout, number, block_bytes, length = _SEGMENT.unpack_from(body)
    if magic != _SEGMENT_MAGIC:
        return None
    text = body[_SEGMENT.size : _SEGMENT.size + length].decode("utf-8", "replace")
    return SegmentHeader(version, layout, number, block_bytes, text)


def is_current(header: SegmentHeader) -> bool:
    """Written by a version whose records this one can read."""
    return header.version == _VERSION


def _sequence(number: int, position: int) -> int:
    return number * MAX_RECORDS + position
