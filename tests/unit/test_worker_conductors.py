"""A worker and its conductors: found, kept while the registry is away, dropped when gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from baton.errors import LayoutMismatch, PeerGone, Unauthenticated
from baton.rpc.memory import MemoryNetwork
from baton.rpc.registry_memory import MemoryRegistry, RegistryServer
from baton.types.fleet import FleetLease, KvLayout, Role, WorkerInfo, WorkerLoad
from baton.types.registry import ConductorInfo
from baton.worker.conductors import LOOK_S, REFUSED_RETRY_S, ConductorSet
from tests.virtual_time import settle, virtual_time

LAYOUT = KvLayout("ab", "float32", 2, 2, 16, 32)
INFO = WorkerInfo("w", Role.DECODE, "i1", "w:1", 7, "demo", LAYOUT, 8, 64, "loopback")
TTL_S = 9.0


@dataclass
class Conductor:
    """A conductor's fleet service, with the workers that it knows."""

    refusal: Exception | None = None
    members: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)

    async def register(self, info: WorkerInfo) -> FleetLease:
        if self.refusal is not None:
            raise self.refusal
        self.members.add(info.name)
        return FleetLease(True, TTL_S)

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        return FleetLease(name in self.members, TTL_S)

    async def leave(self, name: str, incarnation: str) -> None:
        self.members.discard(name)
        self.left.append(name)


@dataclass
class Rig:
    network: MemoryNetwork
    server: RegistryServer
    conductors: ConductorSet
    running: asyncio.Task[None]
    registry: MemoryRegistry

    def add(self, address: str, refusal: Exception | None = None) -> Conductor:
        conductor = Conductor(refusal)
        self.network.add_fleet(address, conductor)
        return conductor

    async def announce(self, *addresses: str, ttl_s: float = 1e6, life: int = 1) -> None:
        for address in addresses:
            info = ConductorInfo(address, f"{address}-{life}", address, address)
            await self.registry.announce(info, ttl_s)

    @property
    def known(self) -> set[str]:
        return set(self.conductors.addresses)


@asynccontextmanager
async def rig(*told: str, with_registry: bool = True) -> AsyncIterator[Rig]:
    server = RegistryServer()
    async with MemoryNetwork() as network:
        conductors = ConductorSet(
            told,
            MemoryRegistry(server, "w") if with_registry else None,
            lambda address: network.fleet_client("w", address),
            INFO,
            WorkerLoad,
        )
        running = asyncio.create_task(conductors.run())
        r = Rig(network, server, conductors, running, MemoryRegistry(server, "test"))
        yield r
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, BaseExceptionGroup):
            await running
        await conductors.aclose()
        assert len(asyncio.all_tasks()) == 1


async def look() -> None:
    """Until the registry has been asked again, and what follows from that has happened."""
    await asyncio.sleep(LOOK_S)
    await settle()


@virtual_time
async def test_conductors_that_were_told_are_registered_with() -> None:
    async with rig("a", "b", with_registry=False) as r:
        a, b = r.add("a"), r.add("b")
        await r.conductors.registered.wait()
        await settle()
        assert a.members == b.members == {"w"}


@virtual_time
async def test_one_that_accepts_is_enough_and_the_other_is_tried_again() -> None:
    async with rig("a", "b", with_registry=False) as r:
        a = r.add("a")
        await r.conductors.registered.wait()
        assert a.members == {"w"}
        await asyncio.sleep(100)
        assert r.known == {"a", "b"}
        b = r.add("b")
        await asyncio.sleep(5)
        assert b.members == {"w"}


@virtual_time
async def test_conductors_are_found_as_they_come() -> None:
    async with rig() as r:
        a, b = r.add("a"), r.add("b")
        await asyncio.sleep(30)
        assert not r.conductors.registered.is_set()
        await r.announce("a")
        await look()
        assert a.members == {"w"}
        assert r.conductors.registered.is_set()
        await r.announce("b")
        await look()
        assert b.members == {"w"}


@virtual_time
async def test_one_that_was_told_and_announced_is_one() -> None:
    async with rig("a") as r:
        r.add("a")
        await r.announce("a")
        await look()
        assert r.known == {"a"}


@virtual_time
async def test_a_dead_conductor_is_dropped_when_its_lease_has_gone_too() -> None:
    async with rig() as r:
        r.add("a")
        b = r.add("b")
        await r.announce("b")
        await r.announce("a", ttl_s=60.0)
        await look()
        r.network.kill("a")
        await asyncio.sleep(2 * TTL_S)
        assert r.known == {"a", "b"}  # its lease says that it may be there
        await asyncio.sleep(60)
        assert r.known == {"b"}
        assert b.members == {"w"}
        assert r.conductors.registered.is_set()


@virtual_time
async def test_a_conductor_that_answers_is_kept_without_a_lease() -> None:
    """As when Redis was started again and has forgotten everything, or the conductor drains."""
    async with rig() as r:
        a = r.add("a")
        await r.announce("a")
        await look()
        r.server.wipe()
        await asyncio.sleep(100)
        assert r.known == {"a"}
        assert a.members == {"w"}


@virtual_time
async def test_while_the_registry_is_away_everybody_stays() -> None:
    async with rig() as r:
        a = r.add("a")
        await r.announce("a")
        await look()
        r.server.down = True
        r.network.kill("a")
        await asyncio.sleep(100)
        assert r.known == {"a"}
        assert not r.conductors.registered.is_set()
        a = r.add("a")  # it comes back before the registry does
        await asyncio.sleep(5)
        assert a.members == {"w"}
        r.server.down = False
        await look()
        assert r.known == {"a"}


@virtual_time
async def test_a_conductor_that_was_told_is_never_dropped() -> None:
    async with rig("a") as r:
        await asyncio.sleep(100)
        assert r.known == {"a"}
        a = r.add("a")
        await asyncio.sleep(5)
        assert a.members == {"w"}


@virtual_time
async def test_a_new_life_at_the_same_address_is_registered_with() -> None:
    async with rig() as r:
        r.add("a")
        await r.announce("a", ttl_s=3.0)
        await look()
        a = r.add("a")  # restarted: it knows nobody
        await asyncio.sleep(TTL_S)
        assert a.members == {"w"}


@virtual_time
async def test_a_new_life_that_is_announced_does_not_wait_for_the_next_renewal() -> None:
    async with rig() as r:
        r.add("a")
        await r.announce("a")
        await look()
        a = r.add("a")
        await r.announce("a", life=2)
        await look()
        assert a.members == {"w"}
        a.members.clear()  # nothing was announced: the next renewal tells
        await look()
        assert not a.members


@pytest.mark.parametrize("error", [LayoutMismatch("other layout"), Unauthenticated("token")])
def test_the_refusal_of_every_conductor_is_the_end(error: Exception) -> None:
    @virtual_time
    async def scenario() -> None:
        async with rig("a", "b", with_registry=False) as r:
            r.add("a", error)
            r.add("b", error)
            with pytest.raises(BaseExceptionGroup) as group:
                await r.running
            assert group.value.subgroup(type(error)) is not None

    scenario()


@virtual_time
async def test_one_refusal_is_not_the_end_when_another_conductor_accepts() -> None:
    async with rig("a", "b", with_registry=False) as r:
        a, b = r.add("a", LayoutMismatch("other layout")), r.add("b")
        await r.conductors.registered.wait()
        await asyncio.sleep(2 * REFUSED_RETRY_S)
        assert (a.members, b.members) == (set(), {"w"})
        a.refusal = None  # its other workers have gone
        await asyncio.sleep(REFUSED_RETRY_S)
        assert a.members == {"w"}
        b.refusal = LayoutMismatch("other layout")
        b.members.clear()
        await asyncio.sleep(TTL_S)
        assert not r.running.done()


@virtual_time
async def test_one_refusal_is_not_the_end_while_another_conductor_does_not_answer() -> None:
    async with rig("a", "b", with_registry=False) as r:
        r.add("a", LayoutMismatch("other layout"))
        await asyncio.sleep(100)
        assert not r.running.done()
        r.add("b", LayoutMismatch("other layout"))
        with pytest.raises(BaseExceptionGroup):
            await r.running


@virtual_time
async def test_leaving_says_goodbye_to_all_and_meets_nobody_new() -> None:
    async with rig("a", "gone") as r:
        a, b, c = r.add("a"), r.add("b"), r.add("c")
        await r.announce("b")
        await look()
        await r.conductors.leave()
        assert a.left == b.left == ["w"]
        await r.announce("c")
        late = r.add("gone")
        await asyncio.sleep(3 * TTL_S)
        assert (a.members, b.members, c.members, late.members) == (set(), set(), set(), set())
        assert (a.left, b.left) == (["w"], ["w"])


@virtual_time
async def test_leaving_takes_no_longer_than_one_goodbye() -> None:
    async with rig("a", "b", "c", with_registry=False) as r:
        silent = [r.add(address) for address in "abc"]
        await r.conductors.registered.wait()
        await settle()

        async def hang(name: str, incarnation: str) -> None:
            await asyncio.sleep(1000)
            raise PeerGone("never")

        for conductor in silent:
            conductor.leave = hang  # type: ignore[method-assign]
        before = asyncio.get_running_loop().time()
        await r.conductors.leave()
        assert asyncio.get_running_loop().time() - before == pytest.approx(5.0)
