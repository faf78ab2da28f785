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
        self._nap: asyncio.Future[None] | None = None  # of the reader, until an item is due

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
        while True:
            while not self._items:
                if self._end is not None:
                    raise PeerGone(self._end)
                self._readable.clear()
                await self._readable.wait()
            due = self._items[0][0]
            if due > 0.0 and (delay := due - self._clock()) > 0:
                await self._sleep(delay)
            if self._items:  # else the end has come before it
                item = self._items.popleft()[1]
                self._writable.set()
                return item

    def end(self, reason: str, *, discard: bool = False, cut: bool = False) -> None:
        """Take no more. What is inside can still be read, unless `discard`; with `cut`, only what
        is due already: what was under way is lost."""
        if self._end is None:
            self._end = reason
        if discard:
            self._items.clear()
        elif cut:
            now = self._clock()
            while self._items and self._items[-1][0] > now:
                self._items.pop()
        if not self._items and self._nap is not None and not self._nap.done():
            self._nap.set_result(None)
        self._readable.set()
        self._writable.set()

    async def _sleep(self, delay: float) -> None:
        """Until then, or until the end if that leaves nothing to wait for."""
        loop = asyncio.get_running_loop()
        self._nap = loop.create_future()
        timer = loop.call_later(delay, _finish, self._nap)
        try:
            await self._nap
        finally:
            timer.cancel()
            self._nap = None


def _finish(nap: asyncio.Future[None]) -> None:
    if not nap.done():
        nap.set_result(None)
