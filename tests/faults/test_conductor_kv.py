"""What conductors know of holders' KV blocks, in virtual time: snapshots, gaps, losses, stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from baton.hashing import block_keys, root_key
from baton.rpc.memory import MemoryNetwork
from baton.types.fleet import Role, WorkerState
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import StartPrefill
from conductor.cluster import ConductorIdentity, describe_cluster
from conductor.expected import ExpectedBlocks
from conductor.fleet import Fleet
from conductor.service import Policy
from conductor.trace_json import timeline_json
from tests.fake_worker import (
    BLOCK_SIZE,
    FINGERPRINT,
    FakeWorker,
    Meeting,
    fake_cluster,
    layout,
    say,
    wait_for,
    worker_info,
)
from tests.unit.test_conductor_dispatch import ask
from tests.virtual_time import settle, virtual_time

TTL = 9.0
P0 = worker_info("p0", Role.PREFILL)


def keys(count: int, salt: str = "") -> bytes:
    """Of the prompt "aaaa...": as many full blocks."""
    shape = layout()
    root = root_key(shape.model, shape.dtype, shape.block_size, cache_salt=salt)
    return b"".join(block_keys(root, [ord("a")] * count * BLOCK_SIZE, BLOCK_SIZE))


def whole(number: int, some: bytes, tier: Tier = Tier.GPU) -> KvSnapshot:
    return KvSnapshot(number, tier, some, first=True, last=True)


@asynccontextmanager
async def fleet_of(worker: FakeWorker) -> AsyncIterator[tuple[Fleet, MemoryNetwork]]:
    async with MemoryNetwork() as network:
        fleet = Fleet(network.worker_dialer("conductor"), TTL, FINGERPRINT)
        running = asyncio.create_task(fleet.run())
        await asyncio.sleep(0)
        network.add_worker(worker.info.address, worker)
        await fleet.register(worker.info)
        await settle()
        try:
            yield fleet, network
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def caching(info: object = P0, held: int = 3) -> FakeWorker:
    worker = FakeWorker(info, say("x"), Meeting())  # type: ignore[arg-type]
    worker.snapshot = whole(7, keys(held))
    return worker


@virtual_time
async def test_a_new_link_asks_for_what_the_worker_has() -> None:
    worker = caching()
    async with fleet_of(worker) as (fleet, _):
        assert worker.resyncs == 1
        (match,) = fleet.prefix_map.matches(keys(5))
        assert (match.holder, match.tier, match.blocks) == ("p0", Tier.GPU, 3)
        await worker.tell(KvEvents(8, Tier.GPU, added=keys(5)[48:]))
        await worker.tell(KvEvents(9, Tier.GPU, removed=keys(5)[64:]))
        await settle()
        assert [found.blocks for found in fleet.prefix_map.matches(keys(5))] == [4]


@virtual_time
async def test_a_gap_is_noticed_and_healed_by_one_snapshot() -> None:
    worker = caching()
    async with fleet_of(worker) as (fleet, _):
        worker.snapshot = None
        for number in (9, 10, 11):  # 8 is missing
            await worker.tell(KvEvents(number, Tier.GPU, added=keys(9)[128:]))
        await settle()
        assert not list(fleet.prefix_map.matches(keys(5)))
        assert worker.resyncs == 2
        await worker.tell(whole(12, keys(2)))
        await worker.tell(KvEvents(13, Tier.CPU, added=keys(4)[32:]))
        await settle()
        assert [found.blocks for found in fleet.prefix_map.matches(keys(5))] == [4, 2]
        assert worker.resyncs == 2


@virtual_time
async def test_a_holder_that_cannot_be_heard_is_forgotten_until_it_tells_again() -> None:
    worker = caching()
    async with fleet_of(worker) as (fleet, network):
        network.kill(P0.address)
        await settle()
        assert fleet.prefix_map.num_blocks == 0
        network.add_worker(P0.address, worker)
        await asyncio.sleep(1)
        assert worker.resyncs == 2
        assert [found.blocks for found in fleet.prefix_map.matches(keys(5))] == [3]


@virtual_time
async def test_a_dead_worker_s_blocks_are_forgotten() -> None:
    async with fleet_of(caching()) as (fleet, _):
        await asyncio.sleep(2 * TTL)
        assert fleet.view().workers[0].state is WorkerState.DEAD
        assert not list(fleet.prefix_map.matches(keys(5)))


@virtual_time
async def test_another_life_begins_without_blocks() -> None:
    worker = caching()
    async with fleet_of(worker) as (fleet, network):
        new = caching(replace(P0, incarnation="life-2"), held=1)
        network.add_worker(P0.address, new)
        await fleet.register(new.info)
        assert not list(fleet.prefix_map.matches(keys(5)))
        await settle()
        assert [found.blocks for found in fleet.prefix_map.matches(keys(5))] == [1]
        assert (worker.resyncs, new.resyncs) == (1, 1)


@virtual_time
async def test_stores_are_linked_and_listed_and_get_no_work() -> None:
    store = worker_info("store-a", Role.STORE, max_model_len=0, node="a")
    async with fake_cluster(say("ok")) as cluster:
        worker = caching(store, held=20)
        cluster.network.add_worker(store.address, worker)
        await cluster.conductor.fleet.register(store)
        await settle()
        view = cluster.conductor.fleet.view()
        assert [w.info.name for w in view.live(Role.STORE)] == ["store-a"]
        await ask(cluster.conductor, "a" * 400)
        assert worker.starts == []
        identity = ConductorIdentity("c", 1, "i", "h:1", "g:1", 0.0)
        body = describe_cluster(cluster.conductor, identity)
        assert [(s["name"], s["role"], s["state"]) for s in body["stores"]] == [
            ("store-a", "store", "live")
        ]
        assert {w["name"] for w in body["workers"]} == {"prefill-0", "decode-0"}
        # What the store has is a plan for whoever computes the prompt.
        started = cluster.workers["prefill-0"].starts[0]
        assert isinstance(started, StartPrefill)
        (part,) = started.fetch
        assert (part.source.name, part.first_block, part.num_blocks) == ("store-a", 0, 20)
        await cluster.check_nothing_left()


@virtual_time
async def test_a_prefix_draws_requests_and_a_salt_does_not() -> None:
    async with fake_cluster(say("ok"), prefill=3) as cluster:
        holder = cluster.workers["prefill-1"]
        await holder.tell(whole(1, keys(6)))
        await settle()
        for _ in range(4):
            await ask(cluster.conductor, "a" * 100)
        assert len(holder.tasks) == 4
        assert all(not start.fetch for start in holder.starts)
        metrics = cluster.conductor.metrics.render().decode()
        cached = 'baton_route_decisions_total{policy="cache-aware",reason="cached"} 4.0'
        assert cached in metrics
        assert "baton_prefix_map_blocks 6.0" in metrics
        traces = cluster.conductor.traces
        timeline = traces.get(next(iter(traces._timelines)))
        assert timeline is not None
        attempt = timeline_json(timeline, now_s=0.0)["attempts"][0]
        found = {c["worker"]: c["cached_tokens"] for c in attempt["candidates"]}
        assert found["prefill-1"] == 6 * BLOCK_SIZE
        assert max(found.values()) == 6 * BLOCK_SIZE


@virtual_time
async def test_a_prompt_under_way_draws_others_that_begin_alike() -> None:
    async with fake_cluster(say("ok", hang_at=0), prefill=3) as cluster:
        prefillers = [cluster.workers[f"prefill-{n}"] for n in range(3)]
        asked = []
        for number in (1, 2):
            asked.append(asyncio.create_task(ask(cluster.conductor, "a" * 100)))
            await wait_for(lambda n=number: sum(len(w.live) for w in prefillers) == n)
            await asyncio.sleep(0.02)  # until that one should be nearly done
        assert sorted(len(worker.live) for worker in prefillers) == [0, 0, 2]
        assert len(cluster.conductor._dispatcher.placer.expected) == 2
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await cluster.check_nothing_left()


def expected_at(blocks: ExpectedBlocks) -> set[str]:
    return {prompt.worker for group in blocks._groups.values() for prompt in group.values()}


@virtual_time
async def test_nothing_is_expected_of_a_worker_that_was_lost() -> None:
    async with fake_cluster(say("ok", hang_at=0)) as cluster:
        worker, expected = (
            cluster.workers["prefill-0"],
            cluster.conductor._dispatcher.placer.expected,
        )
        asked = asyncio.create_task(ask(cluster.conductor, "a" * 100))
        await wait_for(lambda: bool(worker.live))
        assert expected_at(expected) == {"prefill-0"}
        cluster.network.kill("prefill-0:1")
        await settle()
        assert "prefill-0" not in expected_at(expected)  # the next attempt is elsewhere
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


@virtual_time
async def test_long_prompts_are_hashed_as_far_as_somebody_has_them() -> None:
    policy = Policy(lease_ttl_s=1e6)
    async with fake_cluster(say("ok"), policy=policy) as cluster:
        worker = cluster.workers["prefill-0"]
        await worker.tell(whole(1, keys(20)))
        await settle()
        await ask(cluster.conductor, "a" * 400)
        (match,) = cluster.conductor.fleet.prefix_map.matches(keys(25))
        assert match.blocks == 20
        timeline = next(iter(cluster.conductor.traces._timelines.values()))
        candidate = timeline_json(timeline, now_s=0.0)["attempts"][0]["candidates"][0]
        assert candidate["cached_tokens"] == 20 * BLOCK_SIZE
