"""Key -> location of blocks on disk, in about 25 bytes a block: a terabyte of them has millions.

A *location* numbers the places where a record can be, over all segments. `keys` has the key of
every location; `table` is a hash table with open addressing whose entries are locations. So a key
is kept once, and the keys of a segment lie next to each other.

    table  [ 0 | 3+1 | 0 | 0+1 | ... ]      4 bytes an entry, 0 is empty, linear probing
    keys   [ key of 0 | key of 1 | ... ]    16 bytes a location; stale where no entry points to it

Deleting moves later entries of the cluster back, so there are no tombstones (Knuth, TAOCP 3,
section 6.4, algorithm R). Sized once; pages that were never touched take no memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

from baton.errors import InternalError
from baton.hashing import KEY_BYTES

_FILL = 0.67  # of the table at most, with every location in use


class DiskIndex:
    def __init__(self, locations: int) -> None:
        """`locations` is the number of places, below 2^32 - 1."""
        size = 1 << max(3, int(locations / _FILL).bit_length())
        self._mask = size - 1
        self._table = memoryview(mmap.mmap(-1, 4 * size)).cast("I")
        self._keys = memoryview(mmap.mmap(-1, KEY_BYTES * max(1, locations)))
        self._locations = locations
        self._count = 0

    @property
    def nbytes(self) -> int:
        """Of memory, when every page has been touched."""
        return self._table.nbytes + self._keys.nbytes

    @property
    def locations(self) -> int:
        return self._locations

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: bytes) -> bool:
        return self._table[self._probe(key)] != 0

    def __iter__(self) -> Iterator[bytes]:
        """All keys, in no order."""
        return (self.key_at(entry - 1) for entry in self._table if entry)

    def find(self, key: bytes) -> int | None:
        entry = self._table[self._probe(key)]
        return entry - 1 if entry else None

    def put(self, key: bytes, location: int) -> None:
        """Add the key, or move it. Nothing else that is indexed may be at the location."""
        at = self._probe(key)
        if not self._table[at]:
            self._count += 1
        self._keys[location * KEY_BYTES : (location + 1) * KEY_BYTES] = key
        self._table[at] = location + 1

    def remove(self, key: bytes) -> int | None:
        """The location that it had."""
        hole = self._probe(key)
        entry = self._table[hole]
        if not entry:
            return None
        self._count -= 1
        at = hole
        while follower := self._table[at := (at + 1) & self._mask]:
            home = hash(self.key_at(follower - 1)) & self._mask
            if (at - home) & self._mask >= (at - hole) & self._mask:  # its probe passes the hole
                self._table[hole] = follower
                hole = at
        self._table[hole] = 0
        return entry - 1

    def within(self, begin: int, end: int) -> list[tuple[int, bytes]]:
        """What is indexed at locations [begin, end), in order."""
        keys = ((location, self.key_at(location)) for location in range(begin, end))
        return [(location, key) for location, key in keys if self.find(key) == location]

    def key_at(self, location: int) -> bytes:
        return bytes(self._keys[location * KEY_BYTES : (location + 1) * KEY_BYTES])

    def check_integrity(self) -> None:
        entries = [entry - 1 for entry in self._table if entry]
        if len(entries) != self._count or len(set(entries)) != self._count:
            raise InternalError("Disk index is broken: entries were miscounted.")
        for location in entries:
            if self.find(self.key_at(location)) != location:
                raise InternalError("Disk index is broken: an entry cannot be found.")

    def _probe(self, key: bytes) -> int:
        """Where the key's entry is, or the empty place where it would go.

        Python's hash of bytes is keyed by a secret of the process, so nobody can fill one cluster.
        """
        at = hash(key) & self._mask
        while entry := self._table[at]:
            start = (entry - 1) * KEY_BYTES
            if self._keys[start : start + KEY_BYTES] == key:
                return at
            at = (at + 1) & self._mask
        return at
