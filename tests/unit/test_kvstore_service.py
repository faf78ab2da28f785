"""A store that is told to end lets its readers finish."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from baton.kv.blocks.loans import LoanId
from baton.kv.blocks.options import BlocksOptions
from baton.kv.identity import Identity
from baton.kv.transport.loopback import LoopbackFabric, LoopbackTransport
from baton.kv.transport.shared import SharedTransport
from kvstore.service import StoreService
from tests.unit.kvstore_kit import LAYOUT, Areas, chain_of, make_rig, running
from tests.virtual_time import settle, virtual_time


@virtual_time
async def test_it_is_idle_when_nothing_is_lent() -> None:
    rig = make_rig(Areas.of(8), None)
    transport = LoopbackTransport("s-life", LoopbackFabric())
    service = StoreService(
        rig.store,
        rig.memory,
        Identity("s", "s-life", LAYOUT),
        SharedTransport(transport),
        transport.allocate(LAYOUT.block_bytes),
        BlocksOptions(),
    )
    async with running(rig):
        keys = chain_of(1, 2)
        for key in keys:
            rig.put(key)
        await rig.store.settle()
        loan = LoanId("reader", 1)
        async with aclosing(service._source.lend(loan, b"".join(keys))) as groups:
            async for _ in groups:
                pass
        idle = asyncio.create_task(service.wait_idle())
        await asyncio.sleep(60)
        assert not idle.done()
        service._source.end(loan)
        await asyncio.sleep(1)
        await settle()
        assert idle.done()
        await service.aclose()
