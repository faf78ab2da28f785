"""A conductor's lease: renewed, given back, there again after an outage."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from baton.rpc.memory import MemoryNetwork
from baton.rpc.redis_options import RedisOptions
from baton.rpc.registry import open_registry
from baton.rpc.registry_memory import MemoryRegistry, RegistryServer
from baton.types.registry import ConductorInfo
from conductor.announce import RETRY_S, announce
from conductor.cluster import ConductorIdentity, other_conductors
from conductor.service import Conductor, Policy
from tests.fake_worker import tiny_model
from tests.redis_server import BINARY, WHY_NOT, redis_server
from tests.unit.test_conductor_process import conductor as conductor_process
from tests.virtual_time import virtual_time

INFO = ConductorInfo("c", "life", "c:80", "c:50051")
TTL_S = 9.0


@asynccontextmanager
async def announced(
    server: RegistryServer, on_new: Callable[[], None] = lambda: None
) -> AsyncIterator[MemoryRegistry]:
    """The registry as others see it."""
    task = asyncio.create_task(announce(MemoryRegistry(server, "c"), INFO, TTL_S, on_new))
    await asyncio.sleep(0.01)
    yield MemoryRegistry(server, "w")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


@virtual_time
async def test_a_lease_is_renewed_and_given_back() -> None:
    server = RegistryServer()
    async with announced(server) as seen:
        for _ in range(20):
            assert await seen.conductors() == (INFO,)
            await asyncio.sleep(TTL_S / 2)
    assert await seen.conductors() == ()


@virtual_time
async def test_a_registry_that_went_and_forgot_everything_is_told_again() -> None:
    server, new = RegistryServer(), []
    async with announced(server, lambda: new.append(1)) as seen:
        await asyncio.sleep(5 * TTL_S)
        assert len(new) == 1
        server.down = True
        await asyncio.sleep(10 * TTL_S)
        server.wipe()
        server.down = False
        assert await seen.conductors() == ()
        await asyncio.sleep(RETRY_S)
        assert await seen.conductors() == (INFO,)
        assert len(new) == 2
        server.wipe()  # between two renewals: nobody has seen it go
        await asyncio.sleep(TTL_S / 3)
        assert await seen.conductors() == (INFO,)
        assert len(new) == 3


@virtual_time
async def test_the_end_does_not_need_the_registry() -> None:
    server = RegistryServer()
    async with announced(server):
        server.down = True
    assert asyncio.get_running_loop().time() < 1


@pytest.mark.skipif(BINARY is None, reason=WHY_NOT)
async def test_a_conductor_process_is_found_in_redis_until_it_stops() -> None:
    with redis_server("secret") as server:
        flags = ("--redis", server.url, "--cluster-name", "x", "--advertise", "host-7")
        registry = open_registry(RedisOptions(server.url, "x"))
        with conductor_process("--name", "c-1", *flags) as (process, event):
            while not (found := await registry.conductors()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            ports = [str(event[kind]).rpartition(":")[2] for kind in ("http", "grpc")]
            assert found[0].name == "c-1"
            assert [found[0].http, found[0].grpc] == [f"host-7:{port}" for port in ports]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert await registry.conductors() == ()
        await registry.aclose()


@virtual_time
async def test_the_list_of_conductors_needs_the_registry_for_the_others_only() -> None:
    server = RegistryServer()
    async with MemoryNetwork() as network:
        registry = MemoryRegistry(server, "c")
        dialer = network.worker_dialer("c")
        conductor = Conductor(tiny_model(), dialer, Policy(), registry=registry)
        identity = ConductorIdentity("c", 1, INFO.incarnation, INFO.http, INFO.grpc, 0.0)
        other = ConductorInfo("d", "life-d", "d:80", "d:50051")
        for info in (INFO, other):
            await registry.announce(info, TTL_S)
        (listed,) = await other_conductors(conductor, identity)
        assert (listed["name"], listed["address"]) == ("d", "d:80")
        server.down = True
        assert await other_conductors(conductor, identity) == []
        alone = Conductor(tiny_model(), dialer, Policy())
        assert await other_conductors(alone, identity) == []
