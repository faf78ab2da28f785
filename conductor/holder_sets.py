"""Interned sets of (holder, tier): blocks of one prefix share their holders, so sets are few.

A set is an integer with three bits per holder, 3 * index + tier (0 = GPU, 1 = CPU, 2 = NVMe): as
wide as there are holders, and one operation of a few dozen nanoseconds for all of them at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from baton.types.kv_events import Tier

TIERS = tuple(Tier)
_NUM_TIERS = len(TIERS)
_FEW = 16  # bits, from where on numpy is faster than a loop


def pair_bit(holder: int, tier: Tier) -> int:
    return 1 << (_NUM_TIERS * holder + TIERS.index(tier))


def holder_bits(holder: int) -> int:
    """The holder in all tiers."""
    return 0b111 << (_NUM_TIERS * holder)


def reach(members: int) -> int:
    """The set with every holder also in all tiers that are slower than its own."""
    gpu, slower = _every(members, 0b001), _every(members, 0b011)
    return members | (members & slower) << 1 | (members & gpu) << 2


def fastest_bits(reached: int) -> Iterator[int]:
    """Numbers of the bits that stand for the fastest tier of each holder, of some `reach`,
    ascending. One by one: of a crowd, the first few are wanted."""
    left = reached & ~((reached & _every(reached, 0b011)) << 1)
    while left:
        lowest = left & -left
        yield lowest.bit_length() - 1
        left ^= lowest


def bits_of(members: int) -> list[int]:
    """Numbers of the bits that are set, ascending."""
    if members.bit_count() <= _FEW:
        return _few_bits(members)
    bits: list[int] = _many_bits(members).tolist()
    return bits


def pair_of(bit: int) -> tuple[int, Tier]:
    """(holder, tier) that the bit with this number stands for."""
    holder, tier = divmod(bit, _NUM_TIERS)
    return holder, TIERS[tier]


def holders_in(members: int) -> list[int] | npt.NDArray[np.int64]:
    """Of every bit, the holder that it stands for."""
    if members.bit_count() <= _FEW:
        return [bit // _NUM_TIERS for bit in _few_bits(members)]
    return _many_bits(members) // _NUM_TIERS


def _few_bits(members: int) -> list[int]:
    bits = []
    while members:
        bits.append(members.bit_length() - 1)
        members ^= 1 << bits[-1]
    return bits[::-1]


def _many_bits(members: int) -> npt.NDArray[np.int64]:
    size = -(-members.bit_length() // 8)
    octets = np.frombuffer(members.to_bytes(size, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))


def _every(members: int, tiers: int) -> int:
    """These bits of every holder, as wide as `members`."""
    return _pattern(members.bit_length() // _NUM_TIERS + 1, tiers)


@lru_cache(maxsize=4096)
def _pattern(holders: int, tiers: int) -> int:
    return int(tiers * (((1 << _NUM_TIERS * holders) - 1) // 0b111))


class HolderSets:
    """Sets by id; id 0 is the empty set. Another set lives as long as some key refers to it.

    `dropping` a holder changes sets in place, so that keys need not be touched: two ids may then be
    equal sets, and some may be empty while keys still refer to them.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ids: dict[int, int] = {}
        self.members: list[int] = [0]
        self.reach: list[int] = [0]
        self._free: list[int] = []
        self.refs: npt.NDArray[np.int64] = np.zeros(64, np.int64)
        self.vacant: npt.NDArray[np.bool_] = np.zeros(64, np.bool_)  # empty
        self.vacant[0] = True
        self.num_vacant = 0  # keys that refer to empty sets
        self.num_entries = 0  # members of sets, each as often as keys refer to it
        self._int_bytes = 0

    def __len__(self) -> int:
        return len(self.members) - 1 - len(self._free)

    @property
    def memory_bytes(self) -> int:
        lists = sum(map(sys.getsizeof, (self._ids, self.members, self.reach, self._free)))
        return lists + self._int_bytes + self.refs.nbytes + self.vacant.nbytes

    def id_of(self, members: int) -> int:
        """Id of a set that is not empty; 0 when there are as many sets as there may be. One holder
        alone always finds room: there are few such sets, and any other may shrink to one."""
        known = self._ids.get(members)
        if known is not None:
            return known
        if len(self) >= self._limit and members.bit_count() > 1:
            return 0
        if self._free:
            new = self._free.pop()
        else:
            new = len(self.members)
            self.members.append(0)
            self.reach.append(0)
            if new == self.refs.size:
                self.refs = np.concatenate((self.refs, np.zeros_like(self.refs)))
                self.vacant = np.concatenate((self.vacant, np.zeros_like(self.vacant)))
        self._ids[members] = new
        self._set(new, members)
        return new

    def refer(self, which: int, keys: int) -> None:
        """So many more keys refer to it (fewer when negative); a set without any is forgotten."""
        members = self.members[which]
        self.refs[which] += keys
        self.num_entries += keys * members.bit_count()
        if not members:
            self.num_vacant += keys
        if self.refs[which] == 0:
            self._forget(which)

    def drop(self, holder: int) -> None:
        """No set has the holder any more. O(sets)."""
        bits = holder_bits(holder)
        for which in [which for which, members in enumerate(self.members) if members & bits]:
            old = self.members[which]
            refs = int(self.refs[which])
            self.num_entries -= refs * (old & bits).bit_count()
            self._unlist(which)
            new = old & ~bits
            self._set(which, new)
            if new:
                self._ids.setdefault(new, which)
            else:
                self.vacant[which] = True
                self.num_vacant += refs

    def _set(self, which: int, members: int) -> None:
        for values in (self.members, self.reach):
            self._int_bytes -= sys.getsizeof(values[which])
        self.members[which] = members
        self.reach[which] = reach(members)
        for values in (self.members, self.reach):
            self._int_bytes += sys.getsizeof(values[which])

    def _unlist(self, which: int) -> None:
        members = self.members[which]
        if self._ids.get(members) == which:
            del self._ids[members]

    def _forget(self, which: int) -> None:
        self._unlist(which)
        self._set(which, 0)
        self.vacant[which] = False
        self._free.append(which)
