"""Blocks lent by another process: over gRPC and transports, also when it dies or stands still."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from baton.errors import LeaseExpired, PeerGone, TransportError
from baton.kv.blocks.borrower import Borrower
from baton.kv.identity import Identity
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.registry import make_transport
from baton.kv.transport.shared import SharedTransport
from baton.rpc.grpc_client import GrpcBlocksDialer
from baton.types.fleet import Peer
from tests.cluster.blocks_lender import COUNT, OPTIONS, RUN_S, TOKEN
from tests.unit.blocks_kit import contents, keys
from tests.unit.test_blocks_transports import LAYOUT
from tests.unit.transport_kit import view

pytestmark = pytest.mark.cluster


class Rig:
    def __init__(
        self, child: asyncio.subprocess.Process, peer: Peer, borrower: Borrower, memory: PoolMemory
    ) -> None:
        self.child = child
        self.peer = peer
        self._borrower = borrower
        self._memory = memory

    async def borrow(self) -> int:
        """Checks what is said to be good."""
        wanted = range(COUNT)
        count = await self._borrower.borrow(self.peer, keys(*wanted), wanted, timeout_s=20)
        for number in wanted[:count]:
            size = LAYOUT.block_bytes
            found = view(self._memory)[number * size : (number + 1) * size]
            assert np.array_equal(found, contents(number, LAYOUT)), number
        return count


@asynccontextmanager
async def rig(name: str) -> AsyncIterator[Rig]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.cluster.blocks_lender", name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    transport = make_transport(name, "borrower/life1")
    await transport.start()
    memory = await asyncio.to_thread(transport.allocate, COUNT * LAYOUT.block_bytes)
    borrower = Borrower(
        Identity("borrower", "life1", LAYOUT),
        SharedTransport(transport),
        memory,
        GrpcBlocksDialer(TOKEN),
        OPTIONS,
    )
    running = asyncio.create_task(borrower.run())
    try:
        async with asyncio.timeout(30):
            peer = Peer(*json.loads(await child.stdout.readline()))
        yield Rig(child, peer, borrower, memory)
    finally:
        running.cancel()
        await asyncio.wait([running])
        await transport.close()
        if child.returncode is None:
            child.stdin.close()
            try:
                await asyncio.wait_for(child.wait(), 10)
            finally:
                if child.returncode is None:
                    child.kill()
                    await child.wait()


@pytest.mark.parametrize("transport", ["nixl", "nixl-tcp", "shm", "nccl"])
async def test_blocks_of_another_process_arrive(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, tls = transport.partition("-")
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    async with rig(name) as r:
        assert await r.borrow() == COUNT
        assert await r.borrow() == COUNT
    assert r.child.returncode == 0  # its books were even


@pytest.mark.parametrize("name", ["nixl", "shm", "nccl"])
async def test_a_lender_that_is_killed_fails_the_borrow(name: str) -> None:
    async with rig(name) as r:
        borrowing = asyncio.create_task(r.borrow())
        await asyncio.sleep(RUN_S / 2)
        os.kill(r.child.pid, signal.SIGKILL)
        with pytest.raises((PeerGone, TransportError)):  # the stream or a read notices first
            await asyncio.wait_for(borrowing, 20)


@pytest.mark.parametrize("name", ["nixl", "shm"])
async def test_a_lender_that_stood_still_past_its_leases_lends_nothing_wrong(name: str) -> None:
    async with rig(name) as r:
        assert await r.borrow() == COUNT
        borrowing = asyncio.create_task(r.borrow())
        await asyncio.sleep(RUN_S / 2)
        os.kill(r.child.pid, signal.SIGSTOP)
        await asyncio.sleep(2 * OPTIONS.lease_ttl_s)
        os.kill(r.child.pid, signal.SIGCONT)
        with contextlib.suppress(LeaseExpired):
            assert await asyncio.wait_for(borrowing, 20) == COUNT  # its leases were renewed first
        assert await r.borrow() == COUNT
