"""The decode side of the handoff: attach, read what is published, verify, release.

    fetch:   Attach -> Ranges* -> Prefilled -> (all reads done) Release -> Released
                         |
                         '-> read by transport while prefill computes the next chunk

A fetch that fails hands its running transfers to the reader, which waits until they are idle:

    fetch raises --> quarantine(attempt) --> Abort sent, transfers idle --> end_quarantine(attempt)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.counts import Counts
from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    LeaseExpired,
    PeerGone,
    TransportError,
)
from baton.kv.digest import Cell, cells_of, combine, verify_digests
from baton.kv.handoff.figures import HandoffFigures
from baton.kv.handoff.options import HandoffOptions
from baton.kv.handoff.pair import Inbox, Pair
from baton.kv.identity import Identity, life
from baton.kv.layout import Coverage, copies_for
from baton.kv.settle import settle, verdict
from baton.kv.transport.base import PoolMemory, Transfer, Transport
from baton.rpc.errors import from_wire
from baton.rpc.services import HandoffDialer
from baton.tasks import OwnedTasks
from baton.types.fleet import Peer
from baton.types.handoff import (
    Abort,
    Attach,
    Expired,
    Prefilled,
    Ranges,
    Refused,
    Release,
    Released,
)
from baton.types.request import AttemptId, Span
from baton.types.trace import TraceContext

log = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 5.0


class Place(NamedTuple):
    """Local blocks for an attempt's whole context, in order. The first `cached` of them hold its KV
    already, perhaps computed elsewhere: they are neither read nor written."""

    blocks: tuple[int, ...]
    cached: int = 0


Reserve = Callable[[], Awaitable[Place]]
"""Finds a place. Cancelling it must give it back."""


@dataclass(frozen=True, slots=True)
class HandoffStats:
    """When things happened (loop time, seconds) and how much was read."""

    started_s: float
    attached_s: float
    reserved_s: float
    first_range_s: float
    prefilled_s: float  # everything is published; the first token is known
    last_byte_s: float
    released_s: float
    nbytes: int
    ranges: int

    @property
    def exposed_s(self) -> float:
        """How long reading went on after prefill had ended: what overlap did not hide."""
        return max(0.0, self.last_byte_s - self.prefilled_s)

    def spans(self) -> tuple[Span, ...]:
        """In loop time. Reading overlaps with waiting for blocks: nothing is read before."""
        counts = (("bytes", self.nbytes), ("ranges", self.ranges))
        spans = (
            Span("attach", self.started_s, self.attached_s),
            Span("reserve", self.attached_s, self.reserved_s),
            Span("transfer", max(self.first_range_s, self.reserved_s), self.last_byte_s, counts),
            Span("release", max(self.last_byte_s, self.prefilled_s), self.released_s),
        )
        return tuple(span for span in spans if span.start_s <= span.end_s)


@dataclass(frozen=True, slots=True)
class Fetched:
    """KV of a whole context is in `blocks`, verified and released by the prefill worker."""

    prefilled: Prefilled
    blocks: tuple[int, ...]
    stats: HandoffStats


@dataclass(slots=True)
class _Fetch:
    """One attempt under way."""

    attempt: AttemptId
    pair: Pair
    inbox: Inbox
    coverage: Coverage
    started_s: float
    trace: TraceContext | None = None
    attached_s: float = 0.0
    reserved_s: float = 0.0
    first_range_s: float = 0.0
    prefilled_s: float = 0.0
    last_byte_s: float = 0.0
    nbytes: int = 0
    blocks: tuple[int, ...] | None = None
    cached: int = 0
    reserved: asyncio.Event = field(default_factory=asyncio.Event)
    prefilled: Prefilled | None = None
    reads: list[asyncio.Task[None]] = field(default_factory=list)
    running: set[Transfer] = field(default_factory=set)
    cells: list[Cell] = field(default_factory=list)


class HandoffReader:
    """One per decode worker. `fetch` needs `run` to be running.

    `quarantine(attempt)` is called before `fetch` raises, if blocks had been reserved, and
    `end_quarantine(attempt)` exactly once later, when no transfer can write them any more.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        memory: PoolMemory,
        dialer: HandoffDialer,
        quarantine: Callable[[AttemptId], None],
        end_quarantine: Callable[[AttemptId], None],
        options: HandoffOptions,
        figures: HandoffFigures | None = None,
    ) -> None:
        self._identity = identity
        self._transport = transport
        self._memory = memory
        self._dialer = dialer
        self._quarantine = quarantine
        self._end_quarantine = end_quarantine
        self._options = options
        self._figures = figures or HandoffFigures(Counts())
        self._pairs: dict[str, Pair] = {}  # by life: the transport knows each once, too
        self._tasks = OwnedTasks()

    async def run(self) -> None:
        """Own the streams and the waiting for aborted transfers. Runs until cancelled."""
        await self._tasks.run()

    async def fetch(
        self,
        attempt: AttemptId,
        peer: Peer,
        reserve: Reserve,
        timeout_s: float,
        trace: TraceContext | None = None,
    ) -> Fetched:
        """Bring the KV of `attempt` from `peer` into the blocks that `reserve` returns.

        The attempt is attached (so its lease is renewed) while `reserve` waits for room. Raises
        PeerGone, StaleAttempt, LayoutMismatch, LeaseExpired, TransportError, DigestMismatch,
        DeadlineExceeded, what `reserve` raised, or the error with which the peer refused (code
        "finished": the first token ended the answer). Cancelling it frees both sides.
        """
        started = self._now()
        fetch: _Fetch | None = None
        try:
            async with asyncio.timeout(timeout_s):
                pair = await self._pair(peer)
                coverage = Coverage(self._identity.layout.num_layers)
                fetch = _Fetch(attempt, pair, pair.open(attempt), coverage, started, trace)
                fetched = await self._fetch(fetch, reserve)
        except TimeoutError:
            late = DeadlineExceeded(f"{attempt}: no KV from {peer.name} within {timeout_s:g} s")
            self._figures.note_failure(late)
            self._abandon(fetch, late.message)
            raise late from None
        except BaseException as error:
            self._figures.note_failure(error)
            self._abandon(fetch, str(error) or type(error).__name__)
            raise
        pair.close(attempt)
        stats = fetched.stats
        seconds = stats.released_s - (stats.first_range_s or stats.attached_s)
        self._figures.note_taken(seconds, stats.exposed_s, stats.nbytes)
        return fetched

    async def _pair(self, peer: Peer) -> Pair:
        """The stream to this life of `peer`, dialled if need be. Raises why there is none."""
        if not self._tasks.running:
            raise InternalError("HandoffReader.run is not running")
        key = life(peer.name, peer.incarnation)
        pair = self._pairs.get(key)
        if pair is None:
            pair = Pair(peer, self._identity, self._transport, self._dialer, self._options)
            self._pairs[key] = pair
            self._tasks.begin(pair.run(self._forget), f"handoff stream {pair.key}")
        await pair.ready()
        return pair

    def _forget(self, pair: Pair) -> None:
        if self._pairs.get(pair.key) is pair:
            del self._pairs[pair.key]

    async def _fetch(self, fetch: _Fetch, reserve: Reserve) -> Fetched:
        await fetch.pair.send(Attach(fetch.attempt, fetch.trace))
        fetch.attached_s = self._now()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._reserve(fetch, reserve))
                await self._receive(fetch, tasks)
        except BaseExceptionGroup as group:
            raise verdict(group) from None
        if fetch.prefilled is None or fetch.blocks is None:
            raise InternalError(f"{fetch.attempt} was released before it was read")
        return Fetched(fetch.prefilled, fetch.blocks, _stats(fetch, self._now()))

    async def _reserve(self, fetch: _Fetch, reserve: Reserve) -> None:
        fetch.blocks, fetch.cached = await reserve()
        fetch.reserved_s = self._now()
        fetch.reserved.set()

    async def _receive(self, fetch: _Fetch, tasks: asyncio.TaskGroup) -> None:
        """Follow the attempt to `Released`; raise whatever ends it otherwise."""
        releasing = False
        while True:
            message = await fetch.inbox.get()
            match message:
                case Ranges() if not releasing:
                    fetch.first_range_s = fetch.first_range_s or self._now()
                    fetch.coverage.add(
                        message.first_block,
                        len(message.blocks),
                        message.layer_begin,
                        message.layer_end,
                    )
                    fetch.reads.append(tasks.create_task(self._read(fetch, message)))
                case Prefilled() if not releasing:
                    releasing = True
                    fetch.prefilled = message
                    fetch.prefilled_s = self._now()
                    tasks.create_task(self._release(fetch, message))
                case Released():
                    return
                case Expired():
                    raise LeaseExpired(
                        f"the lease of {fetch.attempt} on {fetch.pair.peer.name} ended before it "
                        "was released; what was read is discarded"
                    )
                case Refused():
                    raise from_wire(message.error)
                case BatonError():
                    raise message
                case _:
                    raise TransportError(f"{fetch.pair.peer.name} said {message!r} out of turn")

    async def _read(self, fetch: _Fetch, ranges: Ranges) -> None:
        """Bring one published range into its local blocks and verify it."""
        await fetch.reserved.wait()
        peer = fetch.pair.peer.name
        end = ranges.first_block + len(ranges.blocks)
        local = (fetch.blocks or ())[ranges.first_block : end]
        if len(local) != len(ranges.blocks):
            raise TransportError(
                f"{peer} published blocks up to {end} of {fetch.attempt}, which needs "
                f"{len(fetch.blocks or ())}"
            )
        have = min(max(0, fetch.cached - ranges.first_block), len(local))
        if have < len(local):
            await self._bring(fetch, ranges, local, have)
        fetch.cells += cells_of(ranges.first_block, ranges.layer_begin, ranges.digests)
        fetch.last_byte_s = self._now()

    async def _bring(
        self, fetch: _Fetch, ranges: Ranges, local: tuple[int, ...], have: int
    ) -> None:
        """Read and verify all but the first `have` blocks of a range."""
        layout, layers = self._identity.layout, (ranges.layer_begin, ranges.layer_end)
        copies = copies_for(layout, ranges.blocks[have:], local[have:], *layers)
        async with fetch.pair.slots:
            transfer = self._transport.read(fetch.pair.key, copies)
            fetch.running.add(transfer)
            await transfer.wait()
            fetch.running.discard(transfer)
        await verify_digests(
            self._memory,
            layout,
            local[have:],
            layers,
            ranges.digests[have:],
            fetch.pair.peer.name,
            self._options.inline_digest_bytes,
        )
        fetch.nbytes += sum(copy.length for copy in copies)

    async def _release(self, fetch: _Fetch, prefilled: Prefilled) -> None:
        """When everything is here and nothing is missing, tell the prefill worker."""
        await fetch.reserved.wait()
        count, needed = prefilled.num_blocks, len(fetch.blocks or ())
        if count != needed:
            raise TransportError(f"{fetch.attempt}: {count} blocks published, {needed} needed")
        if missing := fetch.coverage.missing(count):
            raise TransportError(
                f"{fetch.attempt}: {fetch.pair.peer.name} says that prefill is complete, but "
                f"blocks {missing[:8]} were not published in all layers, or not asked for"
            )
        await asyncio.gather(*fetch.reads)
        await fetch.pair.send(Release(fetch.attempt, combine(fetch.cells)))

    def _abandon(self, fetch: _Fetch | None, reason: str) -> None:
        """Give up: from here on the reader's own task owns what still runs."""
        if fetch is None:
            return
        fetch.pair.close(fetch.attempt)
        if fetch.blocks is not None:
            self._quarantine(fetch.attempt)
        if self._tasks.running:  # else closing: transport.close waits for the transfers
            self._tasks.begin(self._settle(fetch, reason), f"settle {fetch.attempt}")

    async def _settle(self, fetch: _Fetch, reason: str) -> None:
        """Tell the peer, wait until nothing writes into the blocks, and say so."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_send_abort(fetch, reason))
            if not await settle(fetch.running, self._options.linger_s, fetch.pair.break_off):
                name = fetch.pair.peer.name
                log.warning("reads of %s hung: closed the stream to %s", fetch.attempt, name)
        if fetch.blocks is not None:
            self._end_quarantine(fetch.attempt)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def _send_abort(fetch: _Fetch, reason: str) -> None:
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await fetch.pair.send(Abort(fetch.attempt, reason))
    except (PeerGone, TimeoutError):
        pass  # a broken stream frees the other side as well


def _stats(fetch: _Fetch, released_s: float) -> HandoffStats:
    return HandoffStats(
        fetch.started_s,
        fetch.attached_s,
        fetch.reserved_s,
        fetch.first_range_s,
        fetch.prefilled_s,
        fetch.last_byte_s,
        released_s,
        fetch.nbytes,
        len(fetch.reads),
    )
