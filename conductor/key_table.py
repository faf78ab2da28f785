"""A hash table from 16-byte keys to 32-bit values, in numpy arrays, for batches of keys.

Rows of eight slots, so that the low halves of a row's keys are one cache line:

    rows      0 .. buckets-1            one per hash value (Litwin 1980: linear hashing)
    overflow  max_rows .. max_rows+n    for rows that are full, linked by `_next`

Keys are cryptographic, so their low bits are the hash. The table doubles row by row: a row gives
the keys whose next bit is set to its new sibling, into the same slots. A round of splits begins
when rows hold ROW_LOAD keys on average, and each insertion pays for a few splits, so that no caller
waits for a rehash. Arrays are allocated for the largest size at once; the system only provides the
pages that were touched. The table never shrinks.

A slot is free when its value is 0; the low half of its key is then 0, too.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.hashing import KEY_BYTES

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
Positions = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

SLOTS = 8  # per row: 64 bytes of low halves
ROW_LOAD = 5  # keys of an average row when a round of splits begins
_SPLITS_PER_KEY = 2  # a round ends after the table has grown by a tenth
_LEAST_SPLITS = 64
_SPLIT_ROWS = 1024  # at once at most: temporary arrays stay in the cache
_FIRST_ROWS = 16
_MAX_ROUNDS = 40  # of an insertion; 5 keys per row on average are hardly ever 20 in one
_OVERFLOW_SHARE = 4  # overflow rows, one for so many others
_OVERFLOW_RARE = 8  # random keys, just inserted, need an overflow row for about 14
_ROW_BYTES = SLOTS * (KEY_BYTES + 4) + 4
_ONE = np.uint64(1)


def split_keys(keys: bytes) -> tuple[U64, U64]:
    """Concatenated keys as their low and high halves."""
    halves = np.frombuffer(keys, np.uint64).reshape(-1, 2)
    return halves[:, 0], halves[:, 1]


def _byte_index(words: U64) -> Positions:
    """Which byte is 1, of words in which one byte is 1 and the others are 0 (little-endian)."""
    # 256**j times this number has j in its highest byte.
    return ((words * np.uint64(0x0001020304050607)) >> np.uint64(56)).view(np.int64)


def _zeros(shape: tuple[int, ...], kind: type[Any]) -> npt.NDArray[Any]:
    """In small pages. numpy asks for huge ones, which take 10 to 60 ms now and then to provide, in
    the middle of an insertion, and make look-ups only a twentieth to a tenth faster."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel that has none
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, kind).reshape(shape)


class KeyTable:
    """Room for `max_keys` keys. Positions stay valid until the next `insert`."""

    def __init__(self, max_keys: int) -> None:
        rows = 1
        while rows * ROW_LOAD < max_keys:
            rows *= 2
        total = rows + max(rows // _OVERFLOW_SHARE, 64)
        self._max_rows = rows
        self._low: U64 = _zeros((total, SLOTS), np.uint64)
        self._high: U64 = _zeros((total, SLOTS), np.uint64)
        self._values: U32 = _zeros((total, SLOTS), np.uint32)
        self._flat_low = self._low.reshape(-1)
        self._flat_high = self._high.reshape(-1)
        self.values: U32 = self._values.reshape(-1)  # by position; 0 = no key
        self._next: npt.NDArray[np.int32] = _zeros(
            (total,), np.int32
        )  # overflow row of a row, 0 = none
        self._level = min(rows, _FIRST_ROWS)  # rows at the beginning of the round
        self._split = 0  # rows of this round that have been split
        self._overflow_end = rows
        self._overflow_free: list[int] = []
        self._compacted = 0  # rows, of this turn over the table
        self.used = 0  # keys

    @property
    def memory_bytes(self) -> int:
        """Of the rows in use."""
        return self.num_rows * _ROW_BYTES + 8 * len(self._overflow_free)

    @property
    def num_rows(self) -> int:
        """In use, for `rows`."""
        return self._level + self._split + self._overflow_end - self._max_rows

    def rows(self, first: int, count: int) -> slice:
        """Positions of at most `count` rows in use, from the one with this number on."""
        split = self._level + self._split
        if first >= split:
            first += self._max_rows - split
            split = self._overflow_end
        return slice(first * SLOTS, min(first + count, split) * SLOTS)

    def find(self, low: U64, high: U64) -> tuple[Positions, U32]:
        """Position and value of each key; a value of 0 = not there, its position means nothing."""
        row = self._home(low)
        at, values = self._find_in(row, low, high)
        if self._overflow_end > self._max_rows:
            self._find_overflowed(row, low, high, at, values)
        return at, values

    def insert(self, low: U64, high: U64, values: U32) -> Flags:
        """Keys that are not in the table, with values other than 0. True where a key went in.

        Not so for repetitions within the batch, and for keys that too many others want the place of
        (which takes chance or chosen keys: a row and its overflow hold a few hundred at most).
        """
        self._grow(low.size)
        self._compact(low.size)
        went_in = self._insert(low, high, values, _MAX_ROUNDS)
        self.used += int(np.count_nonzero(went_in))
        return went_in

    def remove(self, positions: Positions) -> None:
        """Distinct positions of keys that are there."""
        self.values[positions] = 0
        self._flat_low[positions] = 0
        self.used -= positions.size

    def _home(self, low: U64) -> Positions:
        row = (low & np.uint64(2 * self._level - 1)).view(np.int64)
        if self._split:
            row -= self._level * (row >= self._level + self._split)
        else:
            row &= self._level - 1
        return row

    def _find_in(self, row: Positions, low: U64, high: U64) -> tuple[Positions, U32]:
        """As `find`, of keys that are looked for in one row each."""
        hits = (self._low.take(row, axis=0) == low[:, None]).view(np.uint64).reshape(-1)
        if np.count_nonzero(hits & (hits - _ONE)):
            # Half a key was not enough. Zeros look like free slots, too.
            same = self._low[row] == low[:, None]
            same &= self._high[row] == high[:, None]
            same &= self._values[row] != 0
            hits = same.view(np.uint64).reshape(-1)
        at = (row << 3) + _byte_index(hits)
        same = (self._flat_high[at] == high) & (hits != 0)
        return at, self.values[at] * same

    def _find_overflowed(
        self, row: Positions, low: U64, high: U64, at: Positions, values: U32
    ) -> None:
        """Look up what is not in its own row, and complete `at` and `values`."""
        missing = np.flatnonzero(values == 0)
        after = self._next[row[missing]]
        while (linked := np.flatnonzero(after)).size:
            missing, row = missing[linked], after[linked].astype(np.int64)
            at[missing], values[missing] = self._find_in(row, low[missing], high[missing])
            after = self._next[row] * (values[missing] == 0)

    def _insert(self, low: U64, high: U64, values: U32, rounds: int) -> Flags:
        """In each round, a row takes one key or passes all of its keys on to its overflow row."""
        went_in = np.zeros(low.size, np.bool_)
        todo = np.arange(low.size)
        row = self._home(low)
        for _ in range(rounds):
            free = (self._values.take(row, axis=0) == 0).view(np.uint64).reshape(-1)
            full = free == 0
            if full.any():
                row = self._pass_full(row, full)
                todo, row = todo[row >= 0], row[row >= 0]
                if not todo.size:
                    break
                continue
            at = (row << 3) + _byte_index(free & (~free + _ONE))
            # Of several that want a slot, the last one written gets it, the others look again.
            self.values[at] = todo + 1
            lost = self.values[at] != todo + 1
            if not lost.any():
                self._write(at, low[todo], high[todo], values[todo])
                went_in[todo] = True
                break
            won = todo[~lost]
            self._write(at[~lost], low[won], high[won], values[won])
            went_in[won] = True
            todo, row, at = todo[lost], row[lost], at[lost]
            new = (self._flat_low[at] != low[todo]) | (self._flat_high[at] != high[todo])
            todo, row = todo[new], row[new]
            if not todo.size:
                break
        return went_in

    def _write(self, at: Positions, low: U64, high: U64, values: U32) -> None:
        self._flat_low[at] = low
        self._flat_high[at] = high
        self.values[at] = values

    def _pass_full(self, row: Positions, full: Flags) -> Positions:
        """`row` with full rows replaced by their overflow rows, -1 where there is no room."""
        here = np.unique(row[full])
        for head in here[self._next[here] == 0].tolist():
            if self._overflow_free:
                self._next[head] = self._overflow_free.pop()
            elif self._overflow_end < self._next.size:
                self._next[head] = self._overflow_end
                self._overflow_end += 1
        after = self._next[row]
        return np.where(full, np.where(after == 0, -1, after), row)

    def _grow(self, keys: int) -> None:
        """Split rows to have room for so many more keys."""
        due = _SPLITS_PER_KEY * keys + _LEAST_SPLITS
        while due > 0 and self._level < self._max_rows:
            if self._split == 0 and self.used + keys <= ROW_LOAD * self._level:
                return
            count = min(due, _SPLIT_ROWS, self._level - self._split)
            self._split_some(count)
            due -= count
            if self._split == self._level:
                self._level *= 2
                self._split = 0

    def _split_some(self, count: int) -> None:
        begin = self._split
        old = slice(begin, begin + count)
        new = slice(begin + self._level, begin + self._level + count)
        # Products are faster than masked copies; the high halves of free slots do not matter.
        moves = (self._low[old] & np.uint64(self._level)) != 0
        np.multiply(self._low[old], moves, out=self._low[new])
        np.multiply(self._values[old], moves, out=self._values[new])
        self._high[new] = self._high[old]
        self._low[old] -= self._low[new]
        self._values[old] -= self._values[new]
        overflowed = begin + np.flatnonzero(self._next[old])
        self._split += count
        self._insert_overflow_again(overflowed)

    def _compact(self, keys: int) -> None:
        """Give back overflow rows that are no longer needed, a few for so many insertions.

        Rows keep their overflow when it empties; in the long run every row has been full once.
        """
        in_use = self._overflow_end - self._max_rows - len(self._overflow_free)
        rows = self._level + self._split
        if in_use * _OVERFLOW_RARE > rows:
            begin = self._compacted if self._compacted < rows else 0
            self._compacted = begin + keys // 2 + 1
            heads = begin + np.flatnonzero(self._next[begin : min(self._compacted, rows)])
            self._insert_overflow_again(heads)

    def _insert_overflow_again(self, heads: Positions) -> None:
        if heads.size:
            low, high, values = self._take_overflow(heads)
            # All find room: the rows that were freed are enough.
            self._insert(low, high, values, rounds=1 << 62)

    def _take_overflow(self, heads: Positions) -> tuple[U64, U64, U32]:
        """Free the overflow rows of these rows; returns the keys that were in them."""
        rows = []
        while heads.size:
            after = self._next[heads].astype(np.int64)
            self._next[heads] = 0
            heads = after[after != 0]
            rows.append(heads)
        freed = np.concatenate(rows)
        values = self._values[freed].reshape(-1)
        there = values != 0
        low = self._low[freed].reshape(-1)[there]
        high = self._high[freed].reshape(-1)[there]
        self._values[freed] = 0
        self._low[freed] = 0
        self._overflow_free += freed.tolist()
        return low, high, values[there]
