"""One direction of a stream inside a process: a bounded queue that can end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from baton.errors import PeerGone

T = TypeVar("T")
Clock = Callable[[], float]


class Pipe(Generic[T]):
    """Many writers, one reader, one event loop. Cancelling `put` or `get` loses nothing.

    Delays let a fault plan make messages late; they never reorder them. `clock` is what delays are
    measured by: the loop's, unless writer and reader have different ones.
    """

    def __init__(self, capacity: int, clock: Clock | None = None) -> None:
        self._capacity = capacity
        self._clock = clock or asyncio.get_running_loop().time
        self._items: deque[tuple[float, T]] = deque()
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._end: str | None = None

    async def put(self, item: T, delay_s: float = 0.0) -> None:
        """Wait for room, then append. Raises PeerGone once the pipe has ended."""
        while self._end is None and len(self._items) >= self._capacity:
            self._writable.clear()
            await self._writable.wait()
        if self._end is not None:
            raise PeerGone(self._end)
        due = self._clock() + delay_s if delay_s else 0.0
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
            await self._sleep_until(due)
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

    async def _sleep_until(self, due: float) -> None:
        delay = due - self._clock()
        if delay > 0:
            await asyncio.sleep(delay)
