"""What stores and workers count, as an operator sees it: `/metrics`, `GET /cluster`, the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from baton.kv.blocks.options import BlocksOptions
from baton.kv.identity import Identity
from baton.kv.transport.loopback import LoopbackFabric, LoopbackTransport
from baton.kv.transport.shared import SharedTransport
from baton.types.figures import OfferCounts
from baton.types.fleet import Role, WorkerInfo, WorkerLoad
from baton.types.kv_events import Tier
from conductor.cluster import ConductorIdentity, describe_cluster
from conductor.service import Policy
from kvstore.service import StoreService
from tests.fake_worker import FakeCluster, fake_cluster, layout, say, worker_info
from tests.unit.kvstore_kit import (
    BLOCK,
    BROKEN,
    FULL,
    LAYOUT,
    Areas,
    FaultyFiles,
    Rig,
    chain_of,
    disk_options,
    key_of,
    make_rig,
    payload_of,
    running,
)
from tests.virtual_time import settle, virtual_time

SLOTS = 8
STORE = worker_info("store-a", Role.STORE, max_model_len=0, layout=layout())
BLOCK_BYTES = STORE.layout.block_bytes  # of what the conductor was told
TOLD_S = 0.2


@asynccontextmanager
async def served(cluster: FakeCluster, rig: Rig, info: WorkerInfo = STORE) -> AsyncIterator[None]:
    """The store of the rig as a member of the cluster."""
    transport = LoopbackTransport(info.incarnation, LoopbackFabric())
    service = StoreService(
        rig.store,
        rig.memory,
        Identity(info.name, info.incarnation, LAYOUT),
        SharedTransport(transport),
        transport.allocate(LAYOUT.block_bytes),
        BlocksOptions(),
    )
    cluster.network.add_worker(info.address, service.links)
    await cluster.conductor.fleet.register(info)
    async with running(rig), asyncio.TaskGroup() as group:
        group.create_task(service.run())
        await asyncio.sleep(TOLD_S)
        yield
        await service.aclose()


async def metric(cluster: FakeCluster, name: str, **labels: str) -> float:
    """As `/metrics` says it now."""
    await asyncio.sleep(TOLD_S)
    want = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    for line in cluster.conductor.metrics.render().decode().splitlines():
        if line.startswith(f"{name}{{{want}}} "):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"there is no {name}{{{want}}}")


def spoil(directory: Path, key: bytes) -> None:
    """Flip a bit of the block on disk."""
    for file in directory.glob("*.kv"):
        raw = bytearray(file.read_bytes())
        if (at := raw.find(payload_of(key))) >= 0:
            raw[at] ^= 1
            file.write_bytes(raw)


async def put(rig: Rig, first: int, count: int) -> None:
    for key in chain_of(first, count):
        rig.put(key)
        await rig.store.settle()


@virtual_time
async def test_a_failing_disk_is_a_metric_and_a_log_line_and_serving_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = FaultyFiles()
    rig = make_rig(Areas.of(SLOTS), disk_options(tmp_path, records=16), files=files)
    async with fake_cluster(say("ok")) as cluster, served(cluster, rig):
        await put(rig, 1, 10)
        assert await metric(cluster, "baton_store_tier_up", store="store-a", tier="nvme") == 1
        assert await metric(cluster, "baton_store_blocks", store="store-a", tier="nvme") > 0

        files.fail["write"] = BROKEN
        with caplog.at_level(logging.ERROR):
            await put(rig, 11, 10)
        assert "is off: 3 errors" in caplog.text
        assert "check the disk and start the store again" in caplog.text
        assert await metric(cluster, "baton_store_tier_up", store="store-a", tier="nvme") == 0
        assert await metric(cluster, "baton_store_tier_up", store="store-a", tier="cpu") == 1
        assert await metric(cluster, "baton_store_blocks", store="store-a", tier="nvme") == 0
        assert await metric(cluster, "baton_store_disk_errors_total", store="store-a") == 3
        (store,) = describe_cluster(
            cluster.conductor, ConductorIdentity("c", 1, "i", "h:1", "g:1", 0.0)
        )["stores"]
        disk = store["store"]["tiers"][1]
        assert (disk["state"], disk["bytes"]) == ("off", 0)
        assert "injected into write" in disk["why"]

        before = await metric(cluster, "baton_store_puts_total", store="store-a", outcome="stored")
        await put(rig, 30, 3)
        assert await rig.get(chain_of(30, 3)) == 3
        now = await metric(cluster, "baton_store_puts_total", store="store-a", outcome="stored")
        assert now == before + 3
        assert await metric(cluster, "baton_store_hits_total", store="store-a", tier="cpu") == 3


@virtual_time
async def test_a_full_disk_is_down_until_it_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = FaultyFiles(fail={"write": FULL})
    rig = make_rig(Areas.of(SLOTS), disk_options(tmp_path, records=16), files=files)
    async with fake_cluster(say("ok")) as cluster, served(cluster, rig):
        await put(rig, 1, 10)
        assert await metric(cluster, "baton_store_tier_up", store="store-a", tier="nvme") == 0
        assert "Make room there" in caplog.text
        files.fail.clear()
        await asyncio.sleep(60)
        assert await metric(cluster, "baton_store_tier_up", store="store-a", tier="nvme") == 1


@virtual_time
async def test_puts_and_evictions_are_counted_by_what_became_of_them() -> None:
    rig = make_rig(Areas.of(2), None)
    async with fake_cluster(say("ok")) as cluster, served(cluster, rig):
        assert rig.put(key_of(1))
        assert not rig.put(key_of(1))
        assert rig.begin(key_of(2)) is not None
        assert not rig.put(key_of(2))
        rig.begin(key_of(3))  # in place of 1
        assert not rig.put(key_of(4))
        rig.store.abort_put(key_of(2))
        rig.store.abort_put(key_of(3))
        for outcome, count in {
            "stored": 1, "present": 1, "busy": 1, "pressure": 1, "aborted": 2,
        }.items():  # fmt: skip
            labels = {"store": "store-a", "outcome": outcome}
            assert await metric(cluster, "baton_store_puts_total", **labels) == count
        labels = {"store": "store-a", "outcome": "evicted"}
        assert await metric(cluster, "baton_store_evictions_total", **labels) == 1


@virtual_time
async def test_blocks_that_were_damaged_in_either_tier_are_counted(tmp_path: Path) -> None:
    areas, options = Areas.of(SLOTS), disk_options(tmp_path, records=16)
    async with running(make_rig(areas, options)) as rig:
        await put(rig, 1, 12)
        in_memory, on_disk = next(iter(rig.memory)), key_of(1)
        assert rig.store.lookup([on_disk]) == [Tier.NVME]
        areas.payload[BLOCK * (rig.memory.slot_of(in_memory) or 0)] ^= 1
    spoil(tmp_path, on_disk)
    rig = make_rig(areas, options)
    async with fake_cluster(say("ok")) as cluster, served(cluster, rig):
        assert await rig.get([on_disk]) == 0
        assert await metric(cluster, "baton_store_bad_blocks_total", store="store-a") == 2


@virtual_time
async def test_a_store_that_is_started_again_counts_from_zero() -> None:
    rig = make_rig(Areas.of(SLOTS), None)
    labels = {"store": "store-a", "outcome": "stored"}
    async with fake_cluster(say("ok")) as cluster:
        async with served(cluster, rig):
            await put(rig, 1, 3)
            assert await metric(cluster, "baton_store_puts_total", **labels) == 3
        async with served(
            cluster, make_rig(Areas.of(SLOTS), None), replace(STORE, incarnation="life-2")
        ):
            assert await metric(cluster, "baton_store_puts_total", **labels) == 0


@virtual_time
async def test_a_dead_store_has_no_tier_that_is_up() -> None:
    rig = make_rig(Areas.of(SLOTS), None)
    async with fake_cluster(say("ok"), policy=Policy(lease_ttl_s=9.0)) as cluster:
        async with served(cluster, rig):
            assert await metric(cluster, "baton_store_tier_up", store="store-a", tier="cpu") == 1
        await asyncio.sleep(30)
        assert await metric(cluster, "baton_store_tier_up", store="store-a", tier="cpu") == 0


@virtual_time
async def test_what_became_of_a_worker_s_offers() -> None:
    async with fake_cluster(say("ok")) as cluster:
        load = WorkerLoad(offers=OfferCounts(read=5, dropped=4, gone=3, failed=2))
        await cluster.conductor.fleet.renew("prefill-0", "prefill-0-life-1", load)
        await settle()
        text = cluster.conductor.metrics.render().decode()
    for outcome, count in {"read": 5, "dropped": 4, "gone": 3, "failed": 2}.items():
        line = f'baton_worker_offers_total{{outcome="{outcome}",worker="prefill-0"}} {count}.0'
        assert line in text
