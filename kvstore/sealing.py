"""Slots become READY off the event loop: to hash a block reads all of it, at the speed of memory.

    commit     FILLING, complete     -> queue -> a thread hashes a batch -> READY, in order
    recover    CLAIMED, earlier life ----------> a thread hashes a batch -> READY; damaged: FREE

Nobody finds a block before it is READY, so nothing that was not verified is lent. Small blocks are
hashed at once: to hand one to a thread and back costs more than that.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.files import Threads
from kvstore.format import checksum
from kvstore.memory_tier import Claim, MemoryTier

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SealOptions:
    inline_bytes: int = 256 << 10  # blocks up to this size are hashed on the event loop: some 10 us
    batch_bytes: int = 32 << 20  # of one call in a thread; at least one block
    threads: int = 2  # one for what comes in, one for what was found at the start


class Sealer:
    """What waits is bounded by the slots: each belongs to one of them. On the event loop, from
    `open` to `close`."""

    def __init__(self, memory: MemoryTier, threads: Threads, options: SealOptions) -> None:
        self.damaged = 0  # blocks of an earlier process that are not what their headers say
        self._memory = memory
        self._threads = threads
        self._inline = memory.block_bytes <= options.inline_bytes
        self._batch = max(1, options.batch_bytes // memory.block_bytes)
        self._waiting: deque[bytes] = deque()
        self._committing: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Under way."""
        both = (self._committing, self._recovering)
        return [task for task in both if task is not None and not task.done()]

    def open(self) -> None:
        """Claim what an earlier process left, and begin to verify it."""
        self._threads.open()
        if claims := self._memory.claim():
            self._recovering = _spawn(self._recover(claims))

    async def close(self) -> None:
        """Finish what was committed; claims that were not verified stay for the next start."""
        if self._recovering is not None:
            self._recovering.cancel()
        while tasks := self.tasks:
            await asyncio.wait(tasks)
        self._threads.close()

    def commit(self, key: bytes) -> None:
        """The key's slot is complete: it becomes READY, after all that were committed before."""
        if self._inline:
            self._memory.commit(key)
            return
        self._waiting.append(key)
        if self._committing is None or self._committing.done():
            self._committing = _spawn(self._commit_all())

    async def _commit_all(self) -> None:
        while self._waiting:
            count = min(self._batch, len(self._waiting))
            keys = [self._waiting.popleft() for _ in range(count)]
            try:
                views = [self._memory.filling_view(key) for key in keys]
                sums = await self._threads.run(_checksums, views)
            except BaseException:
                for key in [*keys, *self._waiting]:
                    self._memory.abort(key)
                self._waiting.clear()
                raise
            for key, found in zip(keys, sums, strict=True):
                self._memory.commit_hashed(key, found)

    async def _recover(self, claims: Sequence[Claim]) -> None:
        good = 0
        for start in range(0, len(claims), self._batch):
            part = claims[start : start + self._batch]
            views = [self._memory.view(claim.slot) for claim in part]
            sums = await self._threads.run(_checksums, views)
            good += sum(map(self._memory.settle, part, sums))
            self.damaged += sum(
                claim.stored.info.checksum != found for claim, found in zip(part, sums, strict=True)
            )
        log.info("Found %d blocks in memory, %d of them whole", len(claims), good)


def _checksums(views: Sequence[memoryview]) -> list[bytes]:
    return [checksum(view) for view in views]


def _spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(work)
    task.add_done_callback(_log_failure)
    return task


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("Hashing KV blocks failed.", exc_info=error)
