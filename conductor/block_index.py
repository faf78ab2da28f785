"""Block key -> set of (holder, tier): the table and the sets together, changed in batches.

A batch may come from many holders: numpy's cost per call is then shared by all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from baton.hashing import KEY_BYTES
from conductor.holder_sets import HolderSets
from conductor.key_table import SLOTS, U32, U64, Flags, KeyTable, Positions, split_keys

Change = tuple[int, bytes]  # bit of (holder, tier), and the keys that it has got or lost

_KEYS_PER_SET = 64  # max_blocks / this = sets of holders that may exist at once
_LEAST_SETS = 4096
_SWEEP_ROWS = 1024  # at once, while blocks of dropped holders are left
_FIRST_KEYS = 64  # of a chain that are looked up at once, then _MORE times as many
_MORE = 8


class BlockIndex:
    """At most `max_blocks` keys. What finds no room is ignored and counted in `dropped`."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._table = KeyTable(max_blocks)
        self._sets = HolderSets(max(_LEAST_SETS, max_blocks // _KEYS_PER_SET))
        self._swept = 0  # rows, of this turn over the table
        self.dropped = 0

    @property
    def num_blocks(self) -> int:
        return self._table.used - self._sets.num_vacant

    @property
    def num_entries(self) -> int:
        return self._sets.num_entries

    @property
    def memory_bytes(self) -> int:
        return self._table.memory_bytes + self._sets.memory_bytes

    def add(self, changes: Sequence[Change]) -> None:
        low, high, owner = _columns(changes)
        bits = [bit for bit, _ in changes]
        self._make_room(low.size)
        at, values = self._table.find(low, high)
        known = values != 0
        if known.any():
            self._change(at[known], owner[known], bits, adding=True)
            if known.all():
                return
            low, high, owner = low[~known], high[~known], owner[~known]
        self._insert(low, high, owner, bits)

    def remove(self, changes: Sequence[Change]) -> None:
        low, high, owner = _columns(changes)
        at, values = self._table.find(low, high)
        known = values != 0
        if known.any():
            self._change(at[known], owner[known], [bit for bit, _ in changes], adding=False)

    def drop(self, holder: int) -> None:
        """Nobody finds this holder any more. Keys that only it had are removed by sweeps."""
        self._sets.drop(holder)

    def tidy(self) -> None:
        """A bounded part of the work that `drop` has left."""
        if self._sets.num_vacant:
            self._sweep(_SWEEP_ROWS)

    def members(self, key: bytes) -> int:
        """Set of those who have this block."""
        _, values = self._table.find(*split_keys(key))
        return self._sets.members[int(values[0])]

    def reaches(self, keys: bytes) -> tuple[Iterator[tuple[int, int]], int]:
        """The chain's blocks before the first that nobody has, by who has them.

        Gives (first block, `reach` of its set) for each run of blocks with the same set, and the
        number of blocks.
        """
        ids = self._leading_ids(keys)
        changes = np.ones(ids.size, np.bool_)
        changes[1:] = ids[1:] != ids[:-1]
        starts = changes.nonzero()[0]
        sets = map(self._sets.reach.__getitem__, ids[starts].tolist())
        return zip(starts.tolist(), sets, strict=True), ids.size

    def _leading_ids(self, keys: bytes) -> U32:
        low, high = split_keys(keys)
        parts = []
        begin, count = 0, _FIRST_KEYS
        while begin < low.size:
            end = begin + count
            ids = self._table.find(low[begin:end], high[begin:end])[1]
            unknown = self._sets.vacant[ids]
            if np.count_nonzero(unknown):
                parts.append(ids[: unknown.argmax()])
                break
            parts.append(ids)
            begin, count = end, count * _MORE
        return np.concatenate(parts) if parts else np.zeros(0, np.uint32)

    def _insert(self, low: U64, high: U64, owner: Positions, bits: Sequence[int]) -> None:
        room = self._max_blocks - self._table.used
        if low.size > room:
            fits = _among_first(low, high, room)
            self.dropped += int(np.count_nonzero(~fits))
            low, high, owner = low[fits], high[fits], owner[fits]
        ids = np.array([self._sets.id_of(bit) for bit in bits], np.uint32)
        values = ids[owner]
        if not ids.all():
            self.dropped += int(np.count_nonzero(values == 0))
            low, high, owner = low[values != 0], high[values != 0], owner[values != 0]
            values = ids[owner]
        went_in = self._table.insert(low, high, values)
        all_in = bool(went_in.all())
        counts = np.bincount(values if all_in else values[went_in], minlength=int(ids.max()) + 1)
        for which in set(ids.tolist()) - {0}:
            self._sets.refer(which, int(counts[which]))
        if not all_in:
            self._add_repeated(low[~went_in], high[~went_in], owner[~went_in], bits)

    def _add_repeated(self, low: U64, high: U64, owner: Positions, bits: Sequence[int]) -> None:
        """Keys that came several times in a batch are known by now."""
        at, values = self._table.find(low, high)
        known = values != 0
        self.dropped += int(np.count_nonzero(~known))
        self._change(at[known], owner[known], bits, adding=True)

    def _change(
        self, at: Positions, owner: Positions, bits: Sequence[int], *, adding: bool
    ) -> None:
        """Add to or take from the sets of the keys at these positions, which may be repeated."""
        while at.size:
            again = _repeated(at)
            if again is None:
                self._change_each(at, owner, bits, adding)
                return
            self._change_each(at[~again], owner[~again], bits, adding)
            at, owner = at[again], owner[again]

    def _change_each(
        self, at: Positions, owner: Positions, bits: Sequence[int], adding: bool
    ) -> None:
        for pair, where in _groups(self._table.values[at] * np.int64(len(bits)) + owner):
            which, index = divmod(pair, len(bits))
            members = self._sets.members[which]
            wanted = members | bits[index] if adding else members & ~bits[index]
            if wanted == members:
                continue
            mine = at[where]
            new = self._sets.id_of(wanted) if wanted else 0
            if wanted and not new:
                self.dropped += mine.size
                if adding:
                    continue
            self._move(mine, which, new)

    def _move(self, at: Positions, old: int, new: int) -> None:
        if new:
            self._table.values[at] = new
            self._sets.refer(new, at.size)
        else:
            self._table.remove(at)
        self._sets.refer(old, -at.size)

    def _make_room(self, keys: int) -> None:
        """For so many, at the expense of those that nobody holds any more."""
        while self._sets.num_vacant and self._max_blocks - self._table.used < keys:
            self._sweep(16 * _SWEEP_ROWS)

    def _sweep(self, rows: int) -> None:
        """Remove keys that nobody holds from the next rows."""
        part = self._table.rows(self._swept, rows)
        self._swept += (part.stop - part.start) // SLOTS
        if self._swept >= self._table.num_rows:
            self._swept = 0
        ids = self._table.values[part]
        vacant = part.start + np.flatnonzero(self._sets.vacant[ids] & (ids != 0))
        if vacant.size:
            groups = _groups(self._table.values[vacant].astype(np.int64))
            self._table.remove(vacant)
            for which, where in groups:
                self._sets.refer(which, -vacant[where].size)


def _columns(changes: Sequence[Change]) -> tuple[U64, U64, Positions]:
    """Halves of all keys, and for each the index of its change."""
    low, high = split_keys(b"".join([keys for _, keys in changes]))
    if len(changes) == 1:
        return low, high, np.zeros(low.size, np.int64)
    counts = [len(keys) // KEY_BYTES for _, keys in changes]
    return low, high, np.repeat(np.arange(len(changes)), counts)


def _groups(values: Positions) -> list[tuple[int, Positions | slice]]:
    """Each different value, and where it is. There is at least one."""
    if (values == values[0]).all():
        return [(int(values[0]), slice(None))]
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    cuts = [0, *(np.flatnonzero(ordered[1:] != ordered[:-1]) + 1).tolist(), values.size]
    return [(int(ordered[a]), order[a:b]) for a, b in pairwise(cuts)]


def _repeated(values: Positions) -> Flags | None:
    """Marks all but one of each value; None when there is nothing to mark."""
    ordered = np.sort(values)
    if not (ordered[1:] == ordered[:-1]).any():
        return None
    again = np.ones(values.size, np.bool_)
    again[np.unique(values, return_index=True)[1]] = False
    return again


def _among_first(low: U64, high: U64, count: int) -> Flags:
    """Marks the keys that are among the first `count` different ones."""
    _, first, inverse = np.unique(
        np.stack((low, high), axis=1), axis=0, return_index=True, return_inverse=True
    )
    fits = np.zeros(first.size, np.bool_)
    fits[np.argsort(first)[:count]] = True
    return fits[inverse.reshape(-1)]
