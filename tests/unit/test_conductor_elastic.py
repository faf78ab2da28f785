"""What the conductor measures for the planner, and whom it asks to take another role."""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from typing import Any, cast

import pytest

from baton.rpc.registry_memory import MemoryRegistry, RegistryServer
from baton.types.fleet import BlockState, Peer, Role, WorkerLoad, WorkerState
from baton.types.registry import ConductorInfo
from conductor.backlog import Backlog
from conductor.cluster import ConductorIdentity, describe_cluster
from conductor.cost_model import UNKNOWN_WORKER, DecodeCost
from conductor.elastic import Elastic
from conductor.fleet import Fleet
from conductor.planner import Planner, PlannerOptions
from conductor.request import Ask, Options
from conductor.service import Policy
from conductor.views import FleetView, WorkerView
from tests.fake_worker import FakeCluster, fake_cluster, say, wait_for, worker_info
from tests.virtual_time import virtual_time

BOTH = (Role.PREFILL, Role.DECODE)
OPTIONS = PlannerOptions()


async def add(cluster: FakeCluster, prefill: int, decode: int, able: bool = True) -> None:
    roles = BOTH if able else ()
    for number in range(prefill):
        await cluster.add(Role.PREFILL, f"p{number}", say("hello", hang_at=2), roles=roles)
    for number in range(decode):
        await cluster.add(Role.DECODE, f"d{number}", say("hello", hang_at=2), roles=roles)


def elastic(cluster: FakeCluster, registry: MemoryRegistry | None = None) -> Elastic:
    fleet = cluster.conductor.fleet
    return Elastic(fleet, Planner(OPTIONS), None, registry, "m", lambda _: None)


async def look(cluster: FakeCluster, watched: Elastic, work_s: float, times: int) -> None:
    """As `run` does, while prompts of `work_s` seconds are sent per second."""
    for _ in range(times):
        await asyncio.sleep(OPTIONS.look_s)
        cluster.conductor.fleet.prompts_s += work_s * OPTIONS.look_s
        watched.look()
    await asyncio.sleep(0.1)  # for the link


def wanted(cluster: FakeCluster) -> dict[str, list[Role]]:
    return {name: worker.wanted for name, worker in cluster.workers.items() if worker.wanted}


@virtual_time
async def test_the_worker_with_least_to_do_changes() -> None:
    async with fake_cluster(prefill=0, decode=0) as cluster:
        await add(cluster, 1, 3)
        watched = elastic(cluster)
        busy = asyncio.create_task(ask(cluster))
        await wait_for(lambda: any(worker.live for worker in cluster.workers.values()))
        idle = sorted(name for name, worker in cluster.workers.items() if not worker.live)
        await look(cluster, watched, 2.0, OPTIONS.agree + 2)
        assert wanted(cluster) == {next(n for n in idle if n.startswith("d")): [Role.PREFILL]}
        assert watched.last is not None
        assert "1P3D" in watched.last.move.reason
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)


async def ask(cluster: FakeCluster) -> None:
    conductor = cluster.conductor
    request = await conductor.prepare(Ask("tiny", ("what",), Options(max_tokens=9)), "test")
    async for _ in conductor.generate(request):
        pass


@virtual_time
async def test_a_fleet_that_is_not_pressed_stays_as_it_is() -> None:
    async with fake_cluster(prefill=0, decode=0) as cluster:
        await add(cluster, 2, 2)
        await look(cluster, elastic(cluster), 0.3, 20)
        assert wanted(cluster) == {}


@virtual_time
async def test_workers_that_cannot_change_are_not_asked(caplog: pytest.LogCaptureFixture) -> None:
    async with fake_cluster(prefill=0, decode=0) as cluster:
        await add(cluster, 1, 3, able=False)
        with caplog.at_level(logging.WARNING):
            await look(cluster, elastic(cluster), 3.0, OPTIONS.agree + 2)
        assert wanted(cluster) == {}
        assert "no worker can prefill" in caplog.text


@virtual_time
async def test_one_of_several_conductors_acts() -> None:
    async with fake_cluster(prefill=0, decode=0) as cluster:
        await add(cluster, 1, 3)
        server = RegistryServer()
        registry = MemoryRegistry(server, "here")
        watched = elastic(cluster, registry)
        running = asyncio.create_task(watched.run())
        await MemoryRegistry(server, "there").announce(ConductorInfo("c", "a", "h:1", "h:2"), 1e6)
        fleet = cluster.conductor.fleet
        for _ in range(10):
            await asyncio.sleep(OPTIONS.look_s)
            fleet.prompts_s += 3.0 * OPTIONS.look_s
        assert wanted(cluster) == {}, "the other one has the lesser incarnation"
        await MemoryRegistry(server, "there").withdraw("a")
        for _ in range(10):
            await asyncio.sleep(OPTIONS.look_s)
            fleet.prompts_s += 3.0 * OPTIONS.look_s
        assert list(wanted(cluster).values()) == [[Role.PREFILL]]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@virtual_time
async def test_a_conductor_without_the_option_has_no_planner() -> None:
    async with fake_cluster(prefill=0, decode=0) as cluster:
        assert cluster.conductor.elastic is None
    policy = Policy(lease_ttl_s=1e6, planner=OPTIONS)
    async with fake_cluster(prefill=0, decode=0, policy=policy) as cluster:
        assert cluster.conductor.elastic is not None


class Seen:
    """A fleet that is as the test says."""

    def __init__(self, *workers: WorkerView) -> None:
        self.prompts_s = 0.0
        self.workers = workers
        self.asked: list[tuple[str, Role]] = []

    def view(self) -> FleetView:
        return FleetView(self.workers)

    def set_role(self, worker: Peer, role: Role) -> None:
        self.asked.append((worker.name, role))


def worker(name: str, role: Role, load: WorkerLoad, **more: Any) -> WorkerView:
    return WorkerView(worker_info(name, role, roles=BOTH), WorkerState.LIVE, load, **more)


async def demands(*workers: WorkerView) -> tuple[float, float]:
    """Measured once, of prefill and decode."""
    watched = Elastic(cast(Fleet, Seen(*workers)), Planner(OPTIONS), 0.1, None, "m")
    watched.look()
    await asyncio.sleep(OPTIONS.look_s)
    watched.look()
    return watched.planner.demands


IDLE = WorkerLoad(blocks=((BlockState.FREE, 8),))
COST = replace(UNKNOWN_WORKER, decode=DecodeCost(base_s=0.02, sequence_s=0.001))


@virtual_time
async def test_prompts_that_wait_ask_for_prefill_and_not_for_decode() -> None:
    now = asyncio.get_running_loop().time()
    late = worker("p0", Role.PREFILL, IDLE, backlog=Backlog(100, now + OPTIONS.look_s + 60.0))
    load = WorkerLoad(running=40, blocks=((BlockState.FREE, 8),))
    decodes = worker("d0", Role.DECODE, load, own_attempts=40, own_decoding=8, cost=COST)
    prefill, decode = await demands(late, decodes)
    assert prefill == pytest.approx(60.0 / OPTIONS.settle_s)
    assert decode == pytest.approx(8 / 80)  # 80 take 0.1 s


@virtual_time
async def test_a_worker_whose_batch_has_no_place_is_full_whatever_its_blocks_say() -> None:
    load = WorkerLoad(running=8, waiting=4, blocks=((BlockState.FREE, 8),))
    full = worker("d0", Role.DECODE, load, own_attempts=12, own_decoding=8, cost=COST)
    _, decode = await demands(worker("p0", Role.PREFILL, IDLE), full)
    assert decode == pytest.approx(1.5)


@virtual_time
async def test_a_worker_on_its_way_counts_where_it_goes() -> None:
    fleet = Seen(
        *(worker(f"p{n}", Role.PREFILL, IDLE) for n in range(3)),
        worker("d0", Role.DECODE, WorkerLoad(8, 12, blocks=((BlockState.FREE, 8),))),
    )
    watched = Elastic(cast(Fleet, fleet), Planner(OPTIONS), 0.1, None, "m")
    for _ in range(100):
        await asyncio.sleep(OPTIONS.look_s)
        watched.look()
        if fleet.asked:
            break
    assert fleet.asked == [("p0", Role.DECODE)]
    fleet.workers = fleet.workers[1:]  # it drains, and one more would be too many
    for _ in range(20):
        await asyncio.sleep(OPTIONS.look_s)
        watched.look()
    assert watched.last is not None
    assert watched.last.move.reason.startswith("2P2D is asked")


@virtual_time
async def test_only_the_conductor_that_plans_says_what_is_wanted() -> None:
    policy = Policy(lease_ttl_s=1e6, planner=replace(OPTIONS, moves=False))
    async with fake_cluster(prefill=1, decode=1, policy=policy) as cluster:
        conductor = cluster.conductor
        assert conductor.elastic is not None
        identity = ConductorIdentity("c", 1, conductor.incarnation, "h:1", "h:2", 0.0)

        def said() -> Any:
            return describe_cluster(conductor, identity)["conductors"][0].get("wanted")

        assert said() is None
        for _ in range(30):  # it looks by itself
            await asyncio.sleep(OPTIONS.look_s)
            conductor.fleet.prompts_s += 3.0 * OPTIONS.look_s
        assert said() == {"prefill": math.ceil(2.85 / OPTIONS.busy), "decode": 1}

        registry = MemoryRegistry(RegistryServer(), "there")
        await registry.announce(ConductorInfo("least", "", "h:1", "h:2"), 1e6)
        conductor.elastic._registry = registry
        running = asyncio.create_task(conductor.elastic.run())
        await asyncio.sleep(OPTIONS.look_s * 2)
        assert said() is None
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
