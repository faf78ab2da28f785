"""Which worker or store holds which KV block in which tier: a view, built from what holders say.

    key -> KeyTable -> id of a set -> HolderSets -> (holder, tier), ...

The view is soft state: a conductor that starts asks every holder for a snapshot. It may know less
than the truth, never what a holder has taken back: so whatever finds no room here is ignored, and
costs at most a block that is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.hashing import KEY_BYTES
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from conductor.block_index import BlockIndex, Change
from conductor.holder_sets import bits_of, pair_bit, pair_of
from conductor.matches import NO_MATCHES, Matches, Roster

_QUEUED_BYTES = 16384  # of keys: what a look-up may have to wait for, about 0.3 ms


@dataclass(slots=True)
class _Holder:
    index: int
    next_number: int
    removing: bool = False  # some removals of it are queued


class PrefixMap:
    """At most `max_blocks` distinct blocks, in memory that grows with what is known.

    Further holders of a known block cost nothing (blocks of a prefix share their set of holders).
    Blocks beyond the bound are ignored until others go, and counted in `dropped`; so are changes
    that would need more than max_blocks / 64 (or 4,096) different sets of several holders, where a
    removal forgets the block for those that are left. The holder does not learn of it; its next
    snapshot tries again.

    Messages are queued and applied together, at the latest when somebody looks. Additions go first,
    so that removals of the same batch make no room yet: let `max_blocks` be a tenth more than all
    holders have room for.
    """

    def __init__(self, max_blocks: int) -> None:
        self._index = BlockIndex(max_blocks)
        self._holders: dict[str, _Holder] = {}
        self._names: list[str] = []  # by index
        self._roster: Roster | None = None  # None: somebody has come or gone
        self._free_indices: list[int] = []
        self._added: list[Change] = []
        self._removed: list[Change] = []
        self._removing: list[_Holder] = []
        self._queued_bytes = 0

    @property
    def num_blocks(self) -> int:
        """Distinct keys that somebody holds."""
        self._flush()
        return self._index.num_blocks

    @property
    def num_entries(self) -> int:
        """(key, holder, tier) triples."""
        self._flush()
        return self._index.num_entries

    @property
    def memory_bytes(self) -> int:
        """Of all arrays and dictionaries, as far as they are in use."""
        self._flush()
        return self._index.memory_bytes

    @property
    def dropped(self) -> int:
        """Changes of single blocks that found no room."""
        self._flush()
        return self._index.dropped

    def apply(self, holder: str, message: KvEvents | KvSnapshot) -> bool:
        """False: ask the holder for a snapshot; until its first part, it is taken to hold nothing.

        That is so when a number is missing (or comes again), and when nothing is known of a holder.
        Raises ValueError for parts of keys.
        """
        if isinstance(message, KvSnapshot) and message.first:
            self.drop(holder)
            self._holders[holder] = _Holder(self._new_index(holder), message.number)
        known = self._holders.get(holder)
        if known is None or message.number != known.next_number:
            self.drop(holder)
            return False
        known.next_number += 1
        if isinstance(message, KvSnapshot):
            self._queue(known, message.tier, message.keys, b"")
        else:
            self._queue(known, message.tier, message.added, message.removed)
        return True

    def drop(self, holder: str) -> None:
        """The holder is dead or starts again: none of its blocks is known any more."""
        known = self._holders.pop(holder, None)
        if known is not None:
            self._flush()
            self._index.drop(known.index)
            self._roster = None
            self._free_indices.append(known.index)

    def matches(self, keys: bytes) -> Matches:
        """Who has how much of the beginning of this chain."""
        self._flush()
        runs, blocks = self._index.reaches(keys)
        if not blocks:
            return NO_MATCHES
        ended: list[tuple[int, int]] = []
        _, active = next(runs)
        for start, reached in runs:
            kept = active & reached
            if kept != active:
                ended.append((start, active ^ kept))
                active = kept
                if not active:
                    break
        if active:
            ended.append((blocks, active))
        return Matches(self._names_now(), tuple(reversed(ended)))

    def knows(self, key: bytes) -> bool:
        """Whether anybody has this block."""
        self._flush()
        return bool(self._index.members(key))

    def holders(self, key: bytes) -> tuple[tuple[str, Tier], ...]:
        """Everybody who has this block, and where."""
        self._flush()
        pairs = map(pair_of, bits_of(self._index.members(key)))
        return tuple((self._names[index], tier) for index, tier in pairs)

    def _names_now(self) -> Roster:
        if self._roster is None:
            index_of = {name: holder.index for name, holder in self._holders.items()}
            self._roster = Roster(tuple(self._names), index_of)
        return self._roster

    def _queue(self, holder: _Holder, tier: Tier, added: bytes, removed: bytes) -> None:
        if len(added) % KEY_BYTES or len(removed) % KEY_BYTES:
            raise ValueError(f"keys of {KEY_BYTES} bytes each, not {len(added)} and {len(removed)}")
        bit = pair_bit(holder.index, tier)
        if added:
            # All additions of a queue are made before its removals.
            if holder.removing:
                self._flush()
            self._added.append((bit, added))
        if removed:
            self._removed.append((bit, removed))
            self._removing.append(holder)
            holder.removing = True
        self._queued_bytes += len(added) + len(removed)
        if self._queued_bytes >= _QUEUED_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._queued_bytes:
            return
        if self._added:
            self._index.add(self._added)
        if self._removed:
            self._index.remove(self._removed)
        for holder in self._removing:
            holder.removing = False
        self._added, self._removed, self._removing = [], [], []
        self._queued_bytes = 0
        self._index.tidy()

    def _new_index(self, name: str) -> int:
        self._roster = None
        if self._free_indices:
            index = self._free_indices.pop()
            self._names[index] = name
            return index
        self._names.append(name)
        return len(self._names) - 1
