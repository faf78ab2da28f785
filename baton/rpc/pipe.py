"""One direction of a stream inside a process: a bounded queue that can end."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from baton.errors import PeerGone

T = TypeVar("T")


class Pipe(Generic[T]):
    """Many writers, one reader, one event loop. Cancelling `put` or `get` loses nothing.

    `due` times (loop time) let a fault plan delay messages; they never reorder them.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[tuple[float, T]] = deque()
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._end: str | None = None

    async def put(self, item: T, due: float = 0.0) -> None:
        """Wait for room, then append. Raises PeerGone once the pipe has ended."""
        while self._end is None and len(self._items) >= self._capacity:
            self._writable.clear()
            await self._writable.wait()
        if self._end is not None:
            raise PeerGone(self._end)
        if self._items:
            due = max(due, self._items[-1][0])
        self._items.append((due, item))
        self._readable.set()

    async def get(self) -> T:
        """The next item. Raises PeerGone when the pipe has ended and nothing is left in it."""
        while not self._items:
            if self._end is not None:
                raise PeerGone(self._end)
            self._readable.clear()
            await self._readable.wait()
        due = self._items[0][0]
        if due > 0.0:
            await _sleep_until(due)
        if not self._items:  # discarded while this one was under way
            return await self.get()
        item = self._items.popleft()[1]
        self._writable.set()
        return item

    def end(self, reason: str, *, discard: bool = False) -> None:
        """Take no more; what is inside can still be read unless `discard`."""
        if self._end is None:
            self._end = reason
        if discard:
            self._items.clear()
        self._readable.set()
        self._writable.set()


async def _sleep_until(due: float) -> None:
    delay = due - asyncio.get_running_loop().time()
    if delay > 0:
        await asyncio.sleep(delay)
