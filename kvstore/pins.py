"""Blocks that somebody asked to keep: they stay in the CPU tier until a time, within a bound.

    pin      a block that is there is held from now on; one that is FILLING, when it is READY
    again    until the later of both times
    expire   by the store's clock; then the block is like any other

A pinned block is neither demoted nor lost, so it is found at the speed of memory. Not more than
`most` blocks are pinned, because the others need room, too. Pins end with the process.
"""

from __future__ import annotations

import heapq

from baton.errors import InternalError
from kvstore.memory_tier import MemoryTier


class Pins:
    """The only owner of who is pinned until when."""

    def __init__(self, memory: MemoryTier, most: int) -> None:
        self.refused = 0  # blocks, since the start
        self._memory = memory
        self._most = most
        self._until: dict[bytes, float] = {}
        self._queue: list[tuple[float, bytes]] = []  # a heap: one entry of each, never too late
        memory.watch(self._on_settled)

    def __len__(self) -> int:
        """Blocks that are pinned, or will be when they are READY."""
        return len(self._until)

    def pin(self, key: bytes, until: float) -> bool:
        """False, and counted: the block is not here, or too many are pinned."""
        before = self._until.get(key)
        if before is not None:
            self._until[key] = max(before, until)
            return True
        ready = key in self._memory
        if len(self) >= self._most or not (ready or self._memory.is_filling(key)):
            self.refused += 1
            return False
        if ready:
            self._memory.pin(key)
        self._until[key] = until
        heapq.heappush(self._queue, (until, key))
        return True

    def expire(self, now: float) -> None:
        """End the pins whose time is over."""
        while self._queue and self._queue[0][0] <= now:
            key = self._queue[0][1]
            until = self._until[key]
            if until > now:  # it was pinned again since
                heapq.heapreplace(self._queue, (until, key))
                continue
            heapq.heappop(self._queue)
            del self._until[key]
            if key in self._memory:
                self._memory.unpin(key)

    def check_integrity(self) -> None:
        """Raise InternalError unless all accounts agree."""
        pins = self._memory.pins()
        for key in self._until:
            if not pins.get(key) and not self._memory.is_filling(key):
                raise InternalError("Accounting of pins is broken: a pinned block is not held.")
        if sorted(key for _, key in self._queue) != sorted(self._until):
            raise InternalError("Accounting of pins is broken: a pin would not end.")

    def _on_settled(self, key: bytes) -> None:
        """The block is not FILLING any more: it is READY, or nothing came of it."""
        if key not in self._until:
            return
        if key in self._memory:
            self._memory.pin(key)
        else:
            del self._until[key]
            self._queue = [entry for entry in self._queue if entry[1] != key]
            heapq.heapify(self._queue)
