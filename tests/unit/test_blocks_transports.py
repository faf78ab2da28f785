"""Borrowing and offering over the transports that move real bytes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import PeerGone
from baton.kv.digest import Verify
from baton.kv.transport.registry import available
from baton.rpc.grpc_client import GrpcBlocksDialer
from baton.rpc.grpc_server import RpcServer
from baton.types.fleet import KvLayout
from tests.fake_worker import wait_for
from tests.unit.blocks_kit import OPTIONS, keys, world

LAYOUT = KvLayout("0123456789abcdef", "bfloat16", 8, 2, 64, 32)  # blocks of 128 KiB
FULL = replace(OPTIONS, verify=Verify.FULL, inline_digest_bytes=1 << 20)
USABLE = [found.name for found in available() if found.usable]


@pytest.mark.parametrize("kind", ["loopback", "shm", "nixl"])
async def test_blocks_go_from_worker_to_store_to_another_worker(kind: str) -> None:
    if kind not in USABLE:
        pytest.skip(f"{kind} does not work here")
    async with world(options=FULL, kind=kind, layout=LAYOUT) as w:
        store = await w.side("s", takes=True)
        one, other = await w.side("a"), await w.side("b")
        one.pool.put(*range(24), first_block=2)
        offers = w.offers(one, store.peer)
        offers.offer(keys(*range(24)), 0)
        await wait_for(lambda: len(store.pool.committed) == 24)
        await wait_for(lambda: offers.counts.read == 1)
        told: list[tuple[int, int]] = []
        async with asyncio.timeout(20):
            assert await other.borrow(store, range(24), layer_groups=4) == 24
            assert await other.borrow(one, [99, 1], [40, 41]) == 0
            count = await other.borrow(
                one, range(4), range(50, 54), layer_groups=2, on_layers=lambda *s: told.append(s)
            )
        assert (count, told) == (4, [(4, 4), (4, 8)])


@pytest.mark.parametrize("kind", ["shm", "nixl"])
async def test_borrows_that_are_cancelled_leave_the_rest_alone(kind: str) -> None:
    if kind not in USABLE:
        pytest.skip(f"{kind} does not work here")
    async with world(options=FULL, kind=kind, layout=LAYOUT) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(*range(16))
        tasks = [
            asyncio.create_task(worker.borrow(store, range(16), range(16 * n, 16 * n + 16)))
            for n in range(4)
        ]
        await asyncio.sleep(0)
        for task in tasks[:3]:
            task.cancel()
        async with asyncio.timeout(20):
            await asyncio.wait(tasks)
        assert tasks[3].result() == 16
        await wait_for(lambda: not store.pool.loans)


async def test_over_grpc_between_pools_in_shared_memory() -> None:
    async with world(options=FULL, kind="shm", layout=LAYOUT) as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        server = RpcServer("127.0.0.1:0", "secret")
        server.add_blocks(store.server)
        address = await server.start()
        store.peer = replace(store.peer, address=address)
        worker.borrower._dialer = GrpcBlocksDialer("secret")
        store.pool.put(*range(8))
        async with asyncio.timeout(20):
            assert await worker.borrow(store, range(8)) == 8
        await store.server.aclose()
        await server.stop(0.1)
        with pytest.raises(PeerGone):
            await worker.borrow(store, range(8))
