"""Workers that die and come back, again and again: a conductor knows of the present life only."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

from baton.types.fleet import Role
from baton.types.kv_events import KvSnapshot, Tier
from tests.fake_worker import FakeCluster, fake_cluster, say
from tests.unit.test_conductor_dispatch import ask
from tests.virtual_time import virtual_time

LIVES = 12
# What timelines and the page's last minutes hold, which are rings.
RINGS = {
    "Timeline", "Asked", "Tracing", "AttemptRecord", "Decision", "Candidate",
    "WorkerView", "WorkerCost", "PrefillCost", "DecodeCost",
    "Slot", "Sketch",
}  # fmt: skip


def held() -> Counter[str]:
    """Objects of the conductor's own types, rings aside."""
    gc.collect()
    kinds = (type(found) for found in gc.get_objects())
    own = (kind.__name__ for kind in kinds if str(kind.__module__).startswith("conductor."))
    return Counter(name for name in own if name not in RINGS)


async def one_life(cluster: FakeCluster, number: int) -> None:
    """Both workers get a new incarnation at a new address, tell of a block, serve, and die."""
    for role in (Role.PREFILL, Role.DECODE):
        name, at = f"{role}-0", f"{role}-0:{number}"
        worker = await cluster.add(
            role, name, say("abc"), incarnation=f"{name}-{number}", address=at
        )
        await worker.tell(KvSnapshot(0, Tier.GPU, bytes([number]) * 16, True, True))
    await ask(cluster.conductor)
    for role in (Role.PREFILL, Role.DECODE):
        cluster.network.kill(f"{role}-0:{number}")
    await asyncio.sleep(1.0)


@virtual_time
async def test_lives_that_are_over_leave_nothing() -> None:
    async with fake_cluster(say("abc")) as cluster:
        conductor = cluster.conductor
        await one_life(cluster, 100)
        await one_life(cluster, 101)
        before, tasks = held(), len(asyncio.all_tasks())
        for number in range(LIVES):
            await one_life(cluster, number)
        after = held()
        assert {name: n - before[name] for name, n in after.items() if n > before[name] + 2} == {}
        assert len(asyncio.all_tasks()) <= tasks + 2
        assert {worker.info.name for worker in conductor.fleet.view().workers} == {
            "prefill-0",
            "decode-0",
        }
        assert conductor.fleet.prefix_map.num_blocks == 0
        assert len(conductor._dispatcher.placer.expected) == 0
