"""What the files of both tiers have in common: names of layouts, checksums, alignment.

Byte by byte, the formats are in `slot_table` (shared memory) and `segment` (disk). All numbers are
little-endian. A reader believes nothing that no checksum covers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import blake2b

import xxhash

from baton.hashing import KEY_BYTES
from baton.types.fleet import KvLayout

ALIGN = 4096
"""Bytes. O_DIRECT wants offsets, lengths and addresses that are multiples of it."""

NO_PARENT = bytes(KEY_BYTES)
_PERSON = b"baton layout v1"


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What is stored with a block's bytes. `parent` is the key before it in its chain, NO_PARENT
    when that is unknown or there is none; `depth` is how many blocks come before it."""

    key: bytes
    depth: int
    parent: bytes
    checksum: bytes  # xxh3_128 of the payload


def checksum(payload: memoryview) -> bytes:
    """XXH3, 128 bits. Against accidents, not against forgery: who can write to the files can read
    the cluster's memory too."""
    return xxhash.xxh3_128_digest(payload)


def seal(header: bytes) -> bytes:
    """8 bytes that tell a whole header from a torn one."""
    return xxhash.xxh3_64_digest(header)


def fingerprint(layout: KvLayout) -> bytes:
    """16 bytes that are equal for equal layouts only."""
    state = blake2b(digest_size=16, person=_PERSON)
    for field in fields(layout):
        value = str(getattr(layout, field.name)).encode("utf-8", "surrogatepass")
        state.update(b"%d:%d:" % (len(field.name), len(value)))
        state.update(field.name.encode() + value)
    return state.digest()


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
