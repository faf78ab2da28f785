"""Gets the KV that sequences want from where the conductor said it is.

    StartPrefill(task, fetch) -> plan -> engine: fetchable
    engine: wanted -> borrow from one source after the other -> engine: arrived
                             the last one, group of layers by group: -> engine: layers_came

A source that has less than it was said to, or fails, ends the fetch: the rest is computed. Nothing
here can fail an attempt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from baton.engine.events import KvWanted
from baton.errors import BatonError
from baton.hashing import KEY_BYTES
from baton.tasks import OwnedTasks
from baton.types.fleet import Peer
from baton.types.kv_events import Tier
from baton.types.link import FetchPart
from baton.types.request import AttemptId

FETCH_TIMEOUT_S = 30.0  # of one source; by then computing would have been faster

log = logging.getLogger(__name__)


class Borrower(Protocol):
    """See `baton.kv.blocks.borrower`."""

    async def borrow(
        self,
        peer: Peer,
        keys: bytes,
        place: Sequence[int],
        *,
        layer_groups: int,
        on_layers: Callable[[int, int], None],
        timeout_s: float,
    ) -> int: ...


class Consumer(Protocol):
    """See `baton.engine.loop.Engine`."""

    def layers_came(self, sequence: int, layer_end: int) -> None: ...

    def arrived(self, sequence: int, blocks: int) -> None: ...


Note = Callable[[Tier, float, int, int], None]
"""Told of each source that was asked: its tier, seconds, blocks that came, and that were wanted."""


class Fetcher:
    """Owns one task per fetch; `run` must be running. What comes last is read in so many groups
    of layers; 0: the engine hears when everything has come, and not before."""

    def __init__(
        self,
        borrower: Borrower,
        engine: Consumer,
        layer_groups: int,
        note: Note = lambda *_: None,
    ) -> None:
        self._borrower = borrower
        self._engine = engine
        self._layer_groups = layer_groups
        self._note = note
        self._plans: dict[AttemptId, tuple[FetchPart, ...]] = {}
        self._tasks: dict[AttemptId, asyncio.Task[int]] = {}
        self._owned = OwnedTasks()

    async def run(self) -> None:
        """Own the tasks until cancelled; then end them all."""
        await self._owned.run()

    def plan(self, attempt: AttemptId, parts: tuple[FetchPart, ...]) -> int:
        """Note where the attempt's KV may be had; the block behind the last of them, for
        `Engine.submit`. The blocks before the first part are in this worker's own pool, as far as
        the conductor knew. `forget` must follow when the attempt has ended."""
        ordered = sorted(parts, key=lambda part: part.first_block)
        end = ordered[0].first_block if ordered else 0
        for part in ordered:
            if part.first_block <= end:
                end = max(end, part.first_block + part.num_blocks)
        if end:
            self._plans[attempt] = parts
        return end

    def forget(self, attempt: AttemptId) -> None:
        """The attempt has ended: its fetch stops, when it is under way."""
        self._plans.pop(attempt, None)
        task = self._tasks.pop(attempt, None)
        if task is not None:
            task.cancel()

    def want(self, wanted: KvWanted) -> None:
        """Begin to fetch; the engine's `arrived` is called once, whatever happens."""
        task = self._owned.begin(self._fetch(wanted), f"fetch {wanted.attempt}")
        self._tasks[wanted.attempt] = task
        # Not by the task itself: one that is cancelled before its turn never runs.
        task.add_done_callback(partial(self._end, wanted))

    def _end(self, wanted: KvWanted, task: asyncio.Task[int]) -> None:
        if self._tasks.get(wanted.attempt) is task:
            del self._tasks[wanted.attempt]
        self._engine.arrived(wanted.sequence, 0 if task.cancelled() else task.result())

    async def _fetch(self, wanted: KvWanted) -> int:
        try:
            return await self._from_sources(wanted)
        except Exception:
            log.exception("the KV of %s could not be fetched", wanted.attempt)
            return 0

    async def _from_sources(self, wanted: KvWanted) -> int:
        """Leading wanted blocks whose KV is there now."""
        came = 0
        parts = sorted(self._plans.pop(wanted.attempt, ()), key=lambda part: part.first_block)
        for part in parts:
            at = wanted.first_block + came
            last = min(part.first_block + part.num_blocks - wanted.first_block, len(wanted.blocks))
            if not part.first_block <= at or last <= came:
                continue
            count = await self._borrow(wanted, part, came, last)
            came += count
            if came < last:
                break
        return came

    async def _borrow(self, wanted: KvWanted, part: FetchPart, first: int, last: int) -> int:
        keys = wanted.keys[first * KEY_BYTES : last * KEY_BYTES]
        place = wanted.blocks[first:last]
        by_layers = self._layer_groups > 0 and last == len(wanted.blocks)

        def on_layers(blocks: int, layer_end: int) -> None:
            if by_layers and blocks == len(place):
                self._engine.layers_came(wanted.sequence, layer_end)

        now = asyncio.get_running_loop().time
        began = now()
        try:
            count = await self._borrower.borrow(
                part.source,
                keys,
                place,
                layer_groups=self._layer_groups if by_layers else 1,
                on_layers=on_layers,
                timeout_s=FETCH_TIMEOUT_S,
            )
        except BatonError as error:
            log.info("%s computes what %s has: %s", wanted.attempt, part.source.name, error.message)
            count = 0
        self._note(part.tier, now() - began, count, len(place))
        return count
