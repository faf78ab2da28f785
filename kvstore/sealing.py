"""Blocks are sealed off the event loop: to hash a block reads all of it, at the speed of memory.

    commit     READY, header blank       -> queue -> a thread hashes a batch -> sealed, in order
    recover    CLAIMED, earlier life ----------> a thread hashes a batch -> READY; damaged: FREE

A block that was just received is found and lent at once: its bytes came under a lease that held,
and with the digests that its owner made. The checksum is for what happens to them later. So a store
that is killed loses what was not sealed, and believes nothing that was not.

Puts come first: sealing begins a moment after them, because a thread that hashes takes memory, and
the interpreter lock, from those that copy.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvstore.files import Threads
from kvstore.format import BlockInfo, checksum
from kvstore.memory_tier import Claim, MemoryTier, Put

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SealOptions:
    delay_s: float = 0.02  # after the first block that waits
    batch_bytes: int = 32 << 20  # of one call in a thread; at least one block
    behind_bytes: int = 1 << 30  # unsealed, with that much no more blocks are taken
    threads: int = 2  # one for what comes in, one for what was found at the start


class Sealer:
    """The only owner of what waits to be sealed. On the event loop, from `open` to `close`."""

    def __init__(self, memory: MemoryTier, threads: Threads, options: SealOptions) -> None:
        self.damaged = 0  # blocks of an earlier process that are not what their headers say
        self._memory = memory
        self._threads = threads
        self._batch = max(1, options.batch_bytes // memory.block_bytes)
        self._most = max(1, options.behind_bytes // memory.block_bytes)
        self._delay_s = options.delay_s
        self._hurried = asyncio.Event()
        self._waiting: deque[Put] = deque()  # also such as were evicted since
        self._sealing: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None

    @property
    def tasks(self) -> list[asyncio.Task[None]]:
        """Under way."""
        both = (self._sealing, self._recovering)
        return [task for task in both if task is not None and not task.done()]

    @property
    def behind(self) -> bool:
        """As much waits as may be lost when the process is killed, but for a batch."""
        return len(self._waiting) >= self._most

    def open(self) -> None:
        """Claim what an earlier process left, and begin to verify it."""
        self._threads.open()
        if claims := self._memory.claim():
            self._recovering = _spawn(self._recover(claims))

    async def close(self) -> None:
        """Seal what was committed; claims that were not verified stay for the next start."""
        if self._recovering is not None:
            self._recovering.cancel()
        self.hurry()
        while tasks := self.tasks:
            await asyncio.wait(tasks)
        self._threads.close()

    def add(self, put: Put) -> None:
        """It was committed: it is sealed after all that were committed before."""
        self._waiting.append(put)
        if self._sealing is None or self._sealing.done():
            self._hurried.clear()
            self._sealing = _spawn(self._seal_all())

    def hurry(self) -> None:
        """Begin with what waits now."""
        self._hurried.set()

    async def info(self, key: bytes) -> BlockInfo:
        """Of a READY block, which must be pinned meanwhile; it is sealed out of turn if need be."""
        put = self._memory.unsealed_put(key)
        if put is not None:
            await self._seal([put])
        return self._memory.info(key)

    async def _seal_all(self) -> None:
        """What cannot be hashed stays as it is: readable, and sealed when it is demoted."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._delay_s):
                await self._hurried.wait()
        while self._waiting:
            count = min(self._batch, len(self._waiting))
            batch = [self._waiting.popleft() for _ in range(count)]
            try:
                await self._seal([put for put in batch if self._memory.is_unsealed(put)])
            except Exception:
                log.exception("%d blocks could not be hashed: they end with this process", count)

    async def _seal(self, puts: Sequence[Put]) -> None:
        """A slot may be evicted and filled anew while it is read: its Put is not unsealed then."""
        views = [self._memory.view(put.slot) for put in puts]
        sums = await self._threads.run(_checksums, views)
        for put, found in zip(puts, sums, strict=True):
            self._memory.seal(put, found)

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
