"""The tier policy: what goes where, who waits for whom, and who holds what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from baton.types.kv_events import Tier
from kvstore.disk_options import DiskState
from kvstore.figures import Refusal
from kvstore.format import ALIGN
from kvstore.loads import LoadOptions
from kvstore.store import StoreOptions
from tests.unit.kvstore_kit import (
    BLOCK,
    BROKEN,
    FULL,
    Areas,
    FaultyFiles,
    InlineThreads,
    Rig,
    chain_of,
    disk_options,
    key_of,
    make_rig,
    running,
)
from tests.virtual_time import settle, virtual_time

A, B, C, D = chain_of(1, 4)
CPU, NVME = Tier.CPU, Tier.NVME


@virtual_time
async def test_a_run_ends_at_the_first_miss() -> None:
    async with running(make_rig(Areas.of(8), None)) as rig:
        rig.put(A)
        rig.put(C)
        assert rig.store.lookup([A, B, C]) == [CPU]
        assert await rig.get([A, B, C]) == 1
        assert await rig.get([B]) == 0


@virtual_time
async def test_why_a_put_is_refused() -> None:
    async with running(make_rig(Areas.of(1), None)) as rig:
        assert rig.begin(A) is not None
        assert rig.begin(A) is None
        assert rig.begin(B) is None
        rig.store.abort_put(A)
        assert rig.put(A)
        assert rig.begin(A) is None
        assert rig.store.stats.refused == {
            Refusal.BUSY: 1,
            Refusal.PRESSURE: 1,
            Refusal.PRESENT: 1,
        }


@virtual_time
async def test_victims_are_on_nvme_before_their_slots_are_needed(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(16), disk_options(tmp_path, records=16))
    async with running(rig):
        for n in range(1, 41):
            assert rig.put(key_of(n))
            await rig.store.settle()
        assert rig.store.stats.lost == 0
        assert rig.store.lookup(chain_of(1, 40)).count(NVME) == 40 - 14
        assert await rig.get(chain_of(1, 40)) == 40


@virtual_time
async def test_puts_that_are_faster_than_nvme_lose_blocks_but_never_wait(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(16), disk_options(tmp_path), threads=InlineThreads(1.0))
    async with running(rig):
        for n in range(1, 41):
            assert rig.put(key_of(n))
        assert rig.store.stats.lost == 40 - 16
        await rig.store.settle()
        assert rig.store.stats.demoted > 0


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1.0])
@virtual_time
async def test_what_is_lost_leaves_no_holes(tmp_path: Path, seconds: float) -> None:
    """Chains come in two pieces each, faster than NVMe takes them."""
    options = disk_options(tmp_path, records=64)
    rig = make_rig(Areas.of(24), options, threads=InlineThreads(seconds))
    chains = [chain_of(10 * n + 1, 10) for n in range(12)]
    async with running(rig):
        for keys in chains:
            rig.put_many(keys[:6])
            await asyncio.sleep(0.4)
            rig.put_many(keys[6:], depth=6, parent=keys[5])
            await asyncio.sleep(0.4)
        await rig.store.settle()
        assert rig.store.stats.lost > 0
        assert rig.disk is not None
        assert len(rig.disk) > 0
        for keys in chains:
            there = [key for key in keys if key in rig.memory or key in rig.disk]
            assert len(rig.store.lookup(keys)) == len(there)


@virtual_time
async def test_a_block_that_is_demoted_stays_readable_and_stays_when_it_is_used(
    tmp_path: Path,
) -> None:
    rig = make_rig(Areas.of(8), disk_options(tmp_path), threads=InlineThreads(1.0))
    async with running(rig):
        keys = chain_of(1, 8)
        for key in keys:
            rig.put(key)
        assert rig.store._demoting.keys() == {A}
        assert await rig.get([A]) == 1
        await rig.store.settle()
        assert rig.store.lookup([A]) == [CPU]


@virtual_time
async def test_blocks_on_nvme_come_back_and_are_then_in_memory(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(8), disk_options(tmp_path, records=16))
    async with running(rig):
        keys = chain_of(1, 20)
        for key in keys:
            rig.put(key)
            await rig.store.settle()
        assert rig.store.lookup([A]) == [NVME]
        assert await rig.get([A]) == 1
        assert rig.store.lookup([A]) == [CPU]
        assert rig.store.loads.stats.promoted == 1
        assert rig.store.stats.hits == {CPU: 0, NVME: 1}


async def evicted(rig: Rig, keys: Sequence[bytes]) -> None:
    """Put blocks and bring them to NVMe only."""
    for key in keys:
        rig.put(key)
        await rig.store.settle()
    for n in range(1000, 1000 + rig.memory.num_slots):
        rig.put(key_of(n))
        await rig.store.settle()
    assert rig.store.lookup(keys) == [NVME] * len(keys)


@virtual_time
async def test_gets_of_one_block_share_one_read(tmp_path: Path) -> None:
    files = FaultyFiles()
    rig = make_rig(Areas.of(8), disk_options(tmp_path, 16), files=files)
    async with running(rig):
        await evicted(rig, [A])
        files.log.clear()
        assert await asyncio.gather(*(rig.get([A]) for _ in range(5))) == [1] * 5
        assert [name for name, _ in files.log].count("read") == 1


@virtual_time
async def test_loads_of_one_get_overlap(tmp_path: Path) -> None:
    rig = make_rig(
        Areas.of(64),
        disk_options(tmp_path, 32),
        StoreOptions(loads=LoadOptions(batches_ahead=4, batch_bytes=BLOCK)),
        threads=InlineThreads(1.0),
    )
    async with running(rig):
        keys = chain_of(1, 8)
        await evicted(rig, keys)
        began = asyncio.get_running_loop().time()
        assert await rig.get(keys) == 8
        assert asyncio.get_running_loop().time() - began < 4.0


@virtual_time
async def test_a_run_is_not_evicted_by_its_own_loads(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(4), disk_options(tmp_path, 16))
    async with running(rig):
        await evicted(rig, [A])
        for key in (B, C, D):
            assert rig.put(key)
            await rig.store.settle()
        await rig.get([B, C, D])
        assert rig.store.lookup([A, B, C, D]) == [NVME, CPU, CPU, CPU]
        assert await rig.get([A, B, C, D]) == 4


@virtual_time
async def test_a_get_ends_when_every_slot_is_pinned(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(4), disk_options(tmp_path, 16))
    async with running(rig):
        keys = chain_of(1, 6)
        await evicted(rig, keys)
        async with aclosing(rig.store.get(keys)) as blocks:
            got = [index async for index, _ in blocks]
        assert got == [0, 1, 2]  # the fourth slot is being demoted
        assert rig.store.loads.stats.cut_short == 1
        rig.store.unpin(keys[:3])
        await rig.store.settle()
        assert await rig.get(keys) == 6


@virtual_time
async def test_a_get_that_is_dropped_pins_nothing(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(16), disk_options(tmp_path, 64), threads=InlineThreads(1.0))
    async with running(rig):
        keys = chain_of(1, 8)
        await evicted(rig, keys)
        waiting = asyncio.create_task(rig.get(keys))
        await asyncio.sleep(0.5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await rig.get(keys, limit=2) == 2
        await rig.store.settle()
        assert rig.memory.pinned == 0
        assert await rig.get(keys) == 8


@virtual_time
async def test_a_slow_disk_ends_the_get_and_the_load_goes_on(tmp_path: Path) -> None:
    threads = InlineThreads()
    rig = make_rig(Areas.of(8), disk_options(tmp_path, 16), threads=threads)
    async with running(rig):
        await evicted(rig, [A])
        threads.delay = 30.0
        began = asyncio.get_running_loop().time()
        assert await rig.get([A]) == 0
        assert asyncio.get_running_loop().time() - began == pytest.approx(5.0)
        assert rig.begin(A) is None  # still on its way
        await rig.store.settle()
        assert rig.store.lookup([A]) == [CPU]
        assert rig.memory.pinned == 0


@virtual_time
async def test_a_damaged_block_is_a_miss(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(8), disk_options(tmp_path, 32))
    async with running(rig):
        keys = chain_of(1, 3)
        await evicted(rig, keys)
        spoil(tmp_path, B)
        assert await rig.get(keys) == 1
        assert rig.store.lookup([B]) == []
        assert rig.store.loads.stats.failed == 1


@virtual_time
async def test_serving_goes_on_without_nvme(tmp_path: Path) -> None:
    files = FaultyFiles()
    rig = make_rig(Areas.of(16), disk_options(tmp_path), files=files)
    async with running(rig):
        files.fail["write"] = BROKEN
        for n in range(1, 60):
            assert rig.put(key_of(n))
            await rig.store.settle()
        assert rig.disk is not None
        assert rig.disk.state is DiskState.OFF
        assert await rig.get([key_of(59)]) == 1


@virtual_time
async def test_a_full_disk_keeps_memory_full_and_losses_counted(tmp_path: Path) -> None:
    files = FaultyFiles(fail={"create": FULL})
    rig = make_rig(Areas.of(16), disk_options(tmp_path), files=files)
    async with running(rig):
        for n in range(1, 30):
            assert rig.put(key_of(n))
            await rig.store.settle()
        assert len(rig.memory) == 16
        assert rig.store.stats.lost == 29 - 16


@virtual_time
async def test_a_restart_has_what_both_tiers_had(tmp_path: Path) -> None:
    areas, options = Areas.of(8), disk_options(tmp_path, 32)
    keys = chain_of(1, 20)
    async with running(make_rig(areas, options)) as rig:
        for key in keys:
            rig.put(key)
            await rig.store.settle()
        before = rig.store.lookup(keys)
    async with running(make_rig(areas, options)) as rig:
        assert rig.store.lookup(keys) == before
        assert await rig.get(keys) == 20


@virtual_time
async def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(8), disk_options(tmp_path, 32), threads=InlineThreads(1.0))
    async with running(rig):
        await evicted(rig, [A, B])
        waiting = asyncio.create_task(rig.get([A, B]))
        for n in range(10, 20):
            rig.put(key_of(n))
        await settle()
    await waiting
    rig.memory.check_integrity()
    assert rig.memory.pinned == 0


@virtual_time
async def test_changes_say_what_changed_and_holdings_what_is_there(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(8), replace(disk_options(tmp_path, 32)))
    async with running(rig):
        known: dict[Tier, set[bytes]] = {CPU: set(), NVME: set()}
        for n in range(1, 20):
            rig.put(key_of(n))
            await rig.store.settle()
            for change in rig.store.take_changes():
                known[change.tier] |= split(change.added)
                known[change.tier] -= split(change.removed)
        assert known[CPU] == set(rig.memory)
        assert rig.disk is not None
        assert known[NVME] == set(rig.disk)
        assert rig.store.take_changes() == []
        assert {tier: split(keys) for tier, keys in rig.store.holdings()} == known


def spoil(directory: Path, key: bytes) -> None:
    """Change a byte of a block on disk."""
    path = min(directory.glob("segment-*"))
    data = path.read_bytes()
    at = data.index(key) + ALIGN
    path.write_bytes(data[:at] + b"x" + data[at + 1 :])


def split(keys: bytes) -> set[bytes]:
    return {keys[at : at + 16] for at in range(0, len(keys), 16)}
