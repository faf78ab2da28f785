"""Which block goes when room is needed: policies behind one small interface.

A block without the one before it in its chain cannot be used. So all policies here evict leaves
first, blocks that no stored block follows, and differ in which leaf: that with the lowest score.

    lru            score = time of last use
    lfu            score = age + uses                        LFU with dynamic ageing
    length_aware   score = age + uses * worth(depth)         GreedyDual-Size-Frequency

`age` is the score of the last victim. It lifts what comes later above what was popular once:
M. Arlitt et al., "Evaluating Content Management Techniques for Web Proxy Caches", 1999; and
L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching", 1998.

Scores only grow while a block stays. So a heap may hold outdated ones, which are put right when
they come up: a use costs O(1), a victim O(log n), amortized. Leaves go to the heap when the next
victim is looked for: until then most blocks of a new chain have got one that follows them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Protocol

from baton.errors import ConfigError, InternalError
from kvstore.format import NO_PARENT

SHARED_DEPTH = 16
"""Blocks. A prefix that much longer is shared half as often: requests differ sooner or later."""

ATTENTION_DEPTH = 850
"""Blocks of 32 tokens. At this depth attention costs as much as all the rest of a block's prefill
(8B parameters: 2 * 8e9 FLOPs a token, and 4 * 36 layers * 4096 for every token before it)."""


class EvictionPolicy(Protocol):
    """Knows the blocks of one tier by their keys; not thread-safe."""

    def on_insert(self, key: bytes, depth: int, parent: bytes = NO_PARENT) -> None:
        """A block was stored. Its parent may be stored or not, now or later."""

    def on_hit(self, key: bytes) -> None: ...

    def on_remove(self, key: bytes) -> None: ...

    def hold(self, key: bytes) -> None:
        """Not a victim until `release`. Holds are not counted."""

    def release(self, key: bytes) -> None: ...

    def victim(self) -> bytes | None:
        """Who is to go next; it stays until `on_remove`. None: all are held or lead to held."""

    def __len__(self) -> int: ...


@dataclass(slots=True, eq=False)
class _Entry:
    key: bytes
    parent: bytes
    depth: int
    uses: int = 1
    score: float = 0.0
    held: bool = False
    queued: bool = False  # a candidate, or in the heap, perhaps with an outdated score
    gone: bool = False


class LeafFirst:
    """The part that all policies share; a policy is a `_score`, which must never fall."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._children: dict[bytes, int] = {}  # stored blocks that follow a key, stored or not
        self._candidates: list[_Entry] = []  # not in the heap yet
        self._heap: list[tuple[float, int, int, _Entry]] = []
        self._pushes = 0
        self._age = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def on_insert(self, key: bytes, depth: int, parent: bytes = NO_PARENT) -> None:
        if key in self._entries:
            raise InternalError("A block was inserted twice into an eviction policy.")
        entry = _Entry(key, parent, depth)
        entry.score = self._score(entry)
        self._entries[key] = entry
        if parent != NO_PARENT:
            self._children[parent] = self._children.get(parent, 0) + 1
        self._queue(entry)

    def on_hit(self, key: bytes) -> None:
        entry = self._entries[key]
        entry.uses += 1
        entry.score = self._score(entry)

    def on_remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        entry.gone = True
        if entry.parent == NO_PARENT:
            return
        left = self._children[entry.parent] - 1
        if left:
            self._children[entry.parent] = left
            return
        del self._children[entry.parent]
        if (parent := self._entries.get(entry.parent)) is not None:
            self._queue(parent)

    def hold(self, key: bytes) -> None:
        self._entries[key].held = True

    def release(self, key: bytes) -> None:
        entry = self._entries[key]
        entry.held = False
        self._queue(entry)

    def victim(self) -> bytes | None:
        self._push_candidates()
        while self._heap:
            score, _, _, entry = self._heap[0]
            if not self._evictable(entry):
                heapq.heappop(self._heap)
                entry.queued = False
            elif entry.score > score:
                heapq.heapreplace(self._heap, self._item(entry))
            else:
                self._age = max(self._age, score)
                return entry.key
        return None

    def _score(self, entry: _Entry) -> float:
        raise NotImplementedError

    def _evictable(self, entry: _Entry) -> bool:
        return not (entry.gone or entry.held or entry.key in self._children)

    def _queue(self, entry: _Entry) -> None:
        if entry.queued or not self._evictable(entry):
            return
        entry.queued = True
        self._candidates.append(entry)
        if len(self._candidates) + len(self._heap) > 2 * len(self._entries) + 64:
            self._drop_gone()

    def _push_candidates(self) -> None:
        for entry in self._candidates:
            if self._evictable(entry):
                heapq.heappush(self._heap, self._item(entry))
            else:
                entry.queued = False
        self._candidates.clear()

    def _item(self, entry: _Entry) -> tuple[float, int, int, _Entry]:
        """Of equal scores the deeper goes first, then the older."""
        self._pushes += 1
        return entry.score, -entry.depth, self._pushes, entry

    def _drop_gone(self) -> None:
        """Blocks that were removed without being victims are still queued."""
        self._candidates = [entry for entry in self._candidates if not entry.gone]
        self._heap = [item for item in self._heap if not item[3].gone]
        heapq.heapify(self._heap)


class Lru(LeafFirst):
    """The leaf that was used longest ago."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0

    def _score(self, entry: _Entry) -> float:
        self._clock += 1
        return self._clock


class Lfu(LeafFirst):
    """The leaf that was used least, where uses long ago count less and less."""

    def _score(self, entry: _Entry) -> float:
        return self._age + entry.uses


class LengthAware(LeafFirst):
    """The leaf with the least expected recomputation to save: deep blocks are shared by few."""

    def _score(self, entry: _Entry) -> float:
        worth = (1 + entry.depth / ATTENTION_DEPTH) / (1 + entry.depth / SHARED_DEPTH)
        return self._age + entry.uses * worth


POLICIES: dict[str, type[LeafFirst]] = {"lru": Lru, "lfu": Lfu, "length_aware": LengthAware}


def make_policy(name: str) -> EvictionPolicy:
    """Raises ConfigError for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"eviction is one of {', '.join(POLICIES)}, not {name!r}")
    return POLICIES[name]()
