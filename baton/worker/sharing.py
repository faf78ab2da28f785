"""A worker's part in the cluster's one big cache.

borrow   what its sequences want, from where the conductor said it is     (fetcher.py)
lend     its pool's blocks to other workers
offer    what it has computed to its node's store
tell     conductors which blocks it holds                                 (kv_news.py)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from baton.engine.events import KvFilled, KvWanted
from baton.engine.loans import Loans
from baton.engine.loop import Engine
from baton.hashing import KEY_BYTES
from baton.kv.blocks.borrower import Borrower
from baton.kv.blocks.loans import LoanId
from baton.kv.blocks.offer import Offers
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.server import BlocksServer
from baton.rpc.grpc_server import RpcServer
from baton.rpc.services import BlocksDialer
from baton.types.fleet import Peer, WorkerLoad
from baton.types.link import FetchPart
from baton.types.request import AttemptId, AttemptOutput, GenerationTask
from baton.worker.fetcher import Fetcher
from baton.worker.kv_news import KvNews, PoolBook
from baton.worker.parts import WorkerParts
from baton.worker.pinning import PromptPins


class PoolSource:
    """Implements `baton.kv.blocks.lender.Source` over an engine's pool."""

    def __init__(self, loans: Loans) -> None:
        self._loans = loans
        self._lent: dict[LoanId, tuple[int, ...]] = {}

    async def lend(self, loan: LoanId, keys: bytes) -> AsyncGenerator[tuple[int, ...], None]:
        parts = [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
        self._lent[loan] = blocks = self._loans.lend(parts)
        yield blocks

    def end(self, loan: LoanId) -> None:
        self._loans.end(self._lent.pop(loan, ()))


class Sharing:
    """Of one engine. `run` owns every task; it ends before the transport is closed."""

    def __init__(self, parts: WorkerParts, engine: Engine, dialer: BlocksDialer) -> None:
        options = BlocksOptions(lease_ttl_s=parts.handoff.lease_ttl_s, verify=parts.handoff.verify)
        common = (parts.identity, parts.shared, parts.memory)
        source = PoolSource(engine.loans)
        self.news = KvNews(PoolBook(engine.loans))
        self.server = BlocksServer(*common, source, None, options, parts.metrics.loans)
        self._borrower = Borrower(*common, dialer, options)
        groups = parts.engine.layer_groups if parts.early_prefill else 0
        self._fetcher = Fetcher(self._borrower, engine, groups, parts.note_fetch)
        self._offers: Offers | None = None
        self._pins: PromptPins | None = None
        if parts.store:
            store = Peer("store", "", parts.store)
            self._offers = Offers(store, *common, dialer, source, options)
            self._pins = PromptPins(parts.identity.layout, self._offers.offer)

    def serve_on(self, server: RpcServer) -> None:
        server.add_blocks(self.server)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            borrowing = group.create_task(self._borrower.run(), name="borrower")
            fetching = group.create_task(self._fetcher.run(), name="fetcher")
            if self._offers is not None:
                group.create_task(self._offers.run(), name="offers")
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                fetching.cancel()
                await asyncio.wait([fetching])  # before the borrower, which ends its transfers
                borrowing.cancel()

    async def aclose(self) -> None:
        """Lend nothing any more."""
        await self.server.aclose()

    def counted(self, load: WorkerLoad) -> WorkerLoad:
        """With what has become of the offers so far."""
        return load if self._offers is None else replace(load, offers=self._offers.counts)

    def plan(self, attempt: AttemptId, parts: tuple[FetchPart, ...]) -> int:
        """Leading blocks that may be had elsewhere, for `Engine.submit`."""
        return self._fetcher.plan(attempt, parts) if parts else 0

    def pin(self, task: GenerationTask) -> None:
        """The attempt's prompt is computed here: let the store keep it, if that was asked for."""
        if self._pins is not None:
            self._pins.begin(task)

    def forget(self, attempt: AttemptId) -> None:
        self._fetcher.forget(attempt)
        if self._pins is not None:
            self._pins.forget(attempt)

    def on_kv_wanted(self, wanted: tuple[KvWanted, ...]) -> None:
        for one in wanted:
            self._fetcher.want(one)

    def on_kv_filled(self, filled: tuple[KvFilled, ...]) -> None:
        if self._offers is not None:
            for one in filled:
                self._offers.offer(one.keys, one.first_block, one.parent)

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        if self._pins is not None:
            self._pins.on_outputs(outputs)
        for output in outputs:
            if output.finish is not None:
                self._fetcher.forget(output.attempt)
