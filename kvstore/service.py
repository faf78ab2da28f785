"""The store as the cluster sees it: lends its blocks, takes what workers offer, tells conductors.

worker  --Ask-->   StoreSource.lend -> Store.get -> slots that the worker reads
worker  --Offer--> StoreSink.reserve -> slots that the store reads into -> commit
conductor <------- KvNews, load
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from baton.errors import InvalidRequest
from baton.hashing import KEY_BYTES
from baton.kv.blocks.loans import LoanId
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.server import BlocksServer
from baton.kv.blocks.taker import Slot
from baton.kv.identity import Identity
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.shared import SharedTransport
from baton.rpc.grpc_server import RpcServer
from baton.types.fleet import BlockState, WorkerLoad
from baton.types.kv_events import Tier
from baton.types.link import StartDecode, StartPrefill
from baton.types.request import AttemptId
from baton.worker.kv_news import KvNews
from baton.worker.links import LinkServer
from baton.worker.member_metrics import MemberMetrics
from kvstore.format import NO_PARENT
from kvstore.memory_tier import MemoryTier, SlotState
from kvstore.store import Store

TELL_S = 0.1  # how old the news may be that conductors have
LEND_AT_ONCE = {Tier.CPU: 256, Tier.NVME: 8}  # blocks of one message, at most


def split(keys: bytes) -> list[bytes]:
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


class StoreSource:
    """Implements `baton.kv.blocks.lender.Source`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pinned: dict[LoanId, list[bytes]] = {}

    @property
    def lends(self) -> bool:
        return bool(self._pinned)

    async def lend(self, loan: LoanId, keys: bytes) -> AsyncGenerator[tuple[int, ...], None]:
        """Blocks of the CPU tier many at a time; those from NVMe as they come."""
        wanted = split(keys)
        tiers = self._store.lookup(wanted)
        pinned = self._pinned.setdefault(loan, [])
        group: list[int] = []
        async with aclosing(self._store.get(wanted)) as found:
            async for index, slot in found:
                pinned.append(wanted[index])
                group.append(slot)
                last = index + 1 >= len(tiers) or tiers[index + 1] is not tiers[index]
                if last or len(group) >= LEND_AT_ONCE[tiers[index]]:
                    yield tuple(group)
                    group.clear()
        if group:
            yield tuple(group)

    def end(self, loan: LoanId) -> None:
        self._store.unpin(self._pinned.pop(loan, ()))


class StoreSink:
    """Implements `baton.kv.blocks.taker.Sink`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def reserve(
        self, keys: bytes, depth: int, parent: bytes, pin_s: float | None
    ) -> Sequence[Slot]:
        wanted = split(keys)
        blocks = self._store.begin_puts(wanted, depth, parent or NO_PARENT, pin_s)
        return [
            Slot(key, index, block)
            for index, (key, block) in enumerate(zip(wanted, blocks, strict=True))
            if block is not None
        ]

    def commit(self, slot: Slot) -> None:
        self._store.commit_put(slot.key)

    def abort(self, slot: Slot) -> None:
        self._store.abort_put(slot.key)


class NoDuty:
    """Implements Duty: a store computes nothing."""

    def start(self, message: StartPrefill | StartDecode) -> None:
        raise InvalidRequest("a store computes nothing: send the attempt to a worker")

    def cancel(self, attempt: AttemptId, reason: str) -> None:
        """There is none."""


class StoreService:
    """Implements `baton.worker.serving.Service`."""

    def __init__(
        self,
        store: Store,
        memory_tier: MemoryTier,
        identity: Identity,
        shared: SharedTransport,
        memory: PoolMemory,
        options: BlocksOptions,
        tell_s: float = TELL_S,
        metrics: MemberMetrics | None = None,
    ) -> None:
        metrics = metrics or MemberMetrics("store")
        self._tell_s = tell_s
        self._store = store
        self._memory_tier = memory_tier
        self._source = StoreSource(store)
        sink = StoreSink(store)
        self.blocks = BlocksServer(
            identity, shared, memory, self._source, sink, options, metrics.loans
        )
        self.links = LinkServer(NoDuty(), self.load, KvNews(store), news_lag=metrics.kv_event_lag)
        self._closed = asyncio.Event()

    def serve_on(self, server: RpcServer) -> None:
        server.add_worker(self.links)
        server.add_blocks(self.blocks)

    async def run(self) -> None:
        while not self._closed.is_set():
            self.links.load_changed()
            try:
                async with asyncio.timeout(self._tell_s):
                    await self._closed.wait()
            except TimeoutError:
                continue

    async def wait_idle(self) -> None:
        """Until nobody reads what was lent."""
        while self._source.lends:  # noqa: ASYNC110 - loans have no event
            await asyncio.sleep(TELL_S)

    async def aclose(self) -> None:
        await self.links.aclose()
        await self.blocks.aclose()
        self._closed.set()

    def load(self) -> WorkerLoad:
        """Slots of the CPU tier as blocks: pinned ones are LEASED; ACTIVE are those that are being
        filled, or verified after a restart."""
        slots = dict(self._memory_tier.counts())
        pinned = self._memory_tier.pinned
        return WorkerLoad(
            blocks=(
                (BlockState.FREE, slots[SlotState.FREE]),
                (BlockState.ACTIVE, slots[SlotState.FILLING] + slots[SlotState.CLAIMED]),
                (BlockState.CACHED, slots[SlotState.READY] - pinned),
                (BlockState.LEASED, pinned),
            ),
            store=self._store.figures(),
        )
