"""What a publisher says about its leases, in order; ranges get their digests on the way.

put -> short work, and nobody waits: digested and said at once, on the event loop
    -> else a queue: long work is done by a thread, so that no stream of tokens stutters
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Generic, TypeVar

from baton.kv.digest import block_digests, hashed_bytes
from baton.kv.handoff.leases import Lease
from baton.kv.handoff.options import HandoffOptions
from baton.kv.transport.base import PoolMemory
from baton.types.fleet import KvLayout
from baton.types.handoff import PrefillMessage, Ranges

PairT = TypeVar("PairT")


class DigestLine(Generic[PairT]):
    """`say` gets what was put, in the order in which it was, and must not raise. `is_live` says
    whether anybody still wants to hear of a lease: for others nothing is digested."""

    def __init__(
        self,
        memory: PoolMemory,
        layout: KvLayout,
        options: HandoffOptions,
        is_live: Callable[[Lease[PairT]], bool],
        say: Callable[[Lease[PairT], PrefillMessage], None],
    ) -> None:
        self._memory = memory
        self._layout = layout
        self._options = options
        self._is_live = is_live
        self._say = say
        self._queue: asyncio.Queue[tuple[Lease[PairT], PrefillMessage]] = asyncio.Queue()
        self._waiting = 0  # in the queue, or in a thread

    def put(self, lease: Lease[PairT], message: PrefillMessage) -> None:
        """Never waits."""
        if self._waiting or self._is_long(message):
            self._waiting += 1
            self._queue.put_nowait((lease, message))
        else:
            self._say(lease, self._digested(message))

    async def run(self) -> None:
        """Until cancelled. The blocks of a lease that ends meanwhile may get other contents while
        they are read here: then nobody hears what came of it."""
        while True:
            lease, message = await self._queue.get()
            if self._is_live(lease) and self._is_long(message):
                message = await asyncio.to_thread(self._digested, message)
            elif self._is_live(lease):
                message = self._digested(message)
            self._waiting -= 1
            if self._is_live(lease):
                self._say(lease, message)

    def _is_long(self, message: PrefillMessage) -> bool:
        if not isinstance(message, Ranges):
            return False
        if self._memory.device != "cpu":
            return True  # the copy from the device is waited for
        layers = message.layer_end - message.layer_begin
        nbytes = hashed_bytes(self._layout, len(message.blocks), layers, self._options.verify)
        return nbytes > self._options.inline_digest_bytes

    def _digested(self, message: PrefillMessage) -> PrefillMessage:
        if not isinstance(message, Ranges):
            return message
        digests = block_digests(
            self._memory,
            self._layout,
            message.blocks,
            message.layer_begin,
            message.layer_end,
            self._options.verify,
        )
        return replace(message, digests=digests)
