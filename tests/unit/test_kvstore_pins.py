"""Blocks that are kept for a time: never lost meanwhile, bounded, and then like any other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.errors import ConfigError
from baton.types.kv_events import Tier
from kvstore.config import StoreConfig
from kvstore.pins import Pins
from tests.unit.kvstore_kit import (
    Areas,
    FaultyFiles,
    InlineThreads,
    Rig,
    chain_of,
    commit_sealed,
    disk_options,
    key_of,
    make_memory,
    make_rig,
    payload_of,
    running,
)
from tests.virtual_time import virtual_time

A, B, C, D, E = chain_of(1, 5)
CPU, NVME = Tier.CPU, Tier.NVME
SLOTS = 8


async def flood(rig: Rig, first: int) -> None:
    """More new blocks than the CPU tier holds."""
    for key in chain_of(first, 4 * SLOTS):
        rig.put(key)
        await rig.store.settle()


@virtual_time
async def test_kept_blocks_outlast_a_flood_and_their_time_ends() -> None:
    async with running(make_rig(Areas.of(SLOTS), None)) as rig:
        rig.put_chain([A, B, C])
        assert [rig.store.keep(key, 100.0) for key in (A, B)] == [True, True]
        await flood(rig, 100)
        assert rig.store.lookup([A, B, C]) == [CPU, CPU]
        assert rig.store.figures().pinned == 2
        await asyncio.sleep(101)
        assert rig.store.figures().pinned == 0
        await flood(rig, 200)
        assert rig.store.lookup([A]) == []


@virtual_time
async def test_kept_blocks_stay_above_nvme(tmp_path: Path) -> None:
    async with running(make_rig(Areas.of(SLOTS), disk_options(tmp_path, 64))) as rig:
        rig.put(A)
        rig.store.keep(A, 100.0)
        await flood(rig, 100)
        assert rig.store.lookup([A]) == [CPU]
        await asyncio.sleep(101)
        await flood(rig, 200)
        assert rig.store.lookup([A]) == [NVME]


@virtual_time
async def test_a_block_that_is_being_demoted_when_it_is_kept_stays(tmp_path: Path) -> None:
    rig = make_rig(Areas.of(SLOTS), disk_options(tmp_path), threads=InlineThreads(1.0))
    async with running(rig):
        for key in chain_of(1, SLOTS):
            rig.put(key)
        assert rig.store._demoting.keys() == {A}
        assert rig.store.keep(A, 100.0)
        await rig.store.settle()
        assert rig.store.lookup([A]) == [CPU]


@virtual_time
async def test_who_is_kept_again_stays_until_the_later_time() -> None:
    async with running(make_rig(Areas.of(SLOTS), None)) as rig:
        rig.put(A)
        for seconds in (10.0, 50.0, 20.0):
            assert rig.store.keep(A, seconds)
        assert rig.memory.pins() == {A: 1}
        for wait, pinned in ((49.0, 1), (2.0, 0)):
            await asyncio.sleep(wait)
            assert rig.store.figures().pinned == pinned
        assert rig.memory.pins() == {}


@virtual_time
async def test_a_block_that_is_being_put_is_kept_from_its_commit_on() -> None:
    async with running(make_rig(Areas.of(SLOTS), None)) as rig:
        for key in (A, B):
            slot = rig.begin(key)
            assert slot is not None
            assert rig.store.keep(key, 100.0)
            rig.memory.view(slot)[:] = payload_of(key)
        rig.store.check_integrity()
        rig.store.commit_put(A)
        rig.store.abort_put(B)
        assert rig.memory.pins() == {A: 1}
        assert rig.store.figures().pinned == 1
        assert rig.put(B)  # the pin went with what was aborted
        await flood(rig, 100)
        assert rig.store.lookup([A]) == [CPU]
        assert rig.store.lookup([B]) == []


@virtual_time
async def test_a_block_on_its_way_up_is_kept_when_it_has_come(tmp_path: Path) -> None:
    files, threads = FaultyFiles(), InlineThreads()
    rig = make_rig(Areas.of(SLOTS), disk_options(tmp_path, 64), files=files, threads=threads)
    async with running(rig):
        rig.put(A)
        await flood(rig, 100)
        assert not rig.store.keep(A, 100.0)  # on NVMe only
        threads.delay = 1.0
        getting = asyncio.create_task(rig.get([A]))
        await asyncio.sleep(0.1)
        assert rig.store.keep(A, 100.0)
        assert await getting == 1
        assert rig.memory.pins() == {A: 1}


@virtual_time
async def test_more_than_the_share_is_refused_and_counted_and_put_all_the_same() -> None:
    async with running(make_rig(Areas.of(SLOTS), None)) as rig:
        keys = chain_of(1, 6)
        rig.put_chain(keys)
        assert [rig.store.keep(key, 100.0) for key in keys] == [True] * 4 + [False] * 2
        assert not rig.store.keep(key_of(99), 100.0)  # not here at all
        assert (rig.store.figures().pinned, rig.store.figures().pins_refused) == (4, 3)
        await flood(rig, 100)
        assert rig.store.lookup(keys) == [CPU] * 4
        assert rig.store.figures().pressure == 0
        await asyncio.sleep(101)
        assert rig.store.keep(key_of(131), 100.0)


@pytest.mark.parametrize("share", [-0.1, 0.95])
def test_a_share_that_leaves_no_room_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="--pin-share must be"):
        StoreConfig(pin_share=share)


@pytest.mark.parametrize("step", [0.1, 1.0, 7.0])
def test_the_queue_has_one_entry_for_each_pin(step: float) -> None:
    memory = make_memory(Areas.of(2))
    pins = Pins(memory, 2)
    for key in (A, B):
        memory.begin(key)
        commit_sealed(memory, key)
    now = 0.0
    for turn in range(100):
        now += step
        pins.expire(now)
        pins.pin((A, B)[turn % 2], now + 5.0)
        pins.check_integrity()
    pins.expire(now + 5.0)
    assert not pins
    assert memory.pins() == {}
