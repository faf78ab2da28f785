"""Blocks are found when they are committed, and outlive their process when they are sealed: in
order, off the event loop. What an earlier process left is found when it is verified."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types.kv_events import Tier
from kvstore.figures import Refusal
from kvstore.files import ThreadPool
from kvstore.memory_tier import MemoryTier, SlotState
from kvstore.sealing import Sealer, SealOptions
from kvstore.store import StoreOptions
from tests.unit.kvstore_kit import (
    BLOCK,
    Areas,
    InlineThreads,
    Rig,
    chain_of,
    disk_options,
    info_of,
    make_memory,
    make_rig,
    payload_of,
    read_block,
    recover,
    running,
)
from tests.virtual_time import run_virtual, settle, virtual_time

T = TypeVar("T")
P = ParamSpec("P")

A, B, C, D = chain_of(1, 4)
BATCHES = SealOptions(delay_s=0.0, batch_bytes=2 * BLOCK)


class BrokenThreads(InlineThreads):
    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no thread today")
        return await super().run(call, *args, **kwargs)


def slow_rig(areas: Areas, delay: float = 1.0) -> Rig:
    options = StoreOptions(sealing=BATCHES)
    return make_rig(areas, None, options, threads=InlineThreads(delay))


def counts(memory: MemoryTier) -> dict[SlotState, int]:
    return {state: count for state, count in memory.counts() if count}


def survivors(areas: Areas) -> list[bytes]:
    """What a process finds that is started when this one is killed now."""
    memory = make_memory(areas.copy())
    recover(memory)
    memory.check_integrity()
    for key in memory:
        slot = memory.slot_of(key)
        assert slot is not None
        assert bytes(memory.view(slot)) == payload_of(key)
    return list(memory)


@virtual_time
async def test_blocks_are_found_at_once_and_sealed_in_the_order_of_commits() -> None:
    areas = Areas.of(8)
    rig = slow_rig(areas)
    async with running(rig):
        rig.put_chain([A, B, C, D])
        assert await rig.get([A, B, C, D]) == 4
        assert survivors(areas) == []
        await asyncio.sleep(1.5)
        assert survivors(areas) == [A, B]  # a batch
        rig.store.check_integrity()
        await rig.store.settle()
        assert survivors(areas) == [A, B, C, D]
        assert rig.memory.info(A).checksum == info_of(A).checksum


@virtual_time
async def test_sealing_waits_for_a_pause_of_the_puts_unless_somebody_waits_for_it() -> None:
    areas = Areas.of(8)
    rig = make_rig(areas, None, StoreOptions(sealing=SealOptions(delay_s=5.0)))
    async with running(rig):
        rig.put_chain([A, B])
        await asyncio.sleep(4.9)
        assert rig.put(C)
        assert survivors(areas) == []
        await asyncio.sleep(0.2)
        assert survivors(areas) == [A, B, C]
        assert rig.put(D)
        await rig.store.settle()
        assert asyncio.get_running_loop().time() < 6.0
        assert survivors(areas) == [A, B, C, D]


@virtual_time
async def test_closing_seals_what_was_committed() -> None:
    areas = Areas.of(4)
    async with running(slow_rig(areas)) as rig:
        rig.put_chain([A, B, C])
    assert rig.memory.unsealed == 0
    async with running(slow_rig(areas)) as again:
        assert await again.get([A, B, C]) == 3


@virtual_time
async def test_what_cannot_be_hashed_stays_readable_and_does_not_outlive_its_process() -> None:
    areas, threads = Areas.of(4), BrokenThreads(failures=1)
    rig = make_rig(areas, None, StoreOptions(sealing=BATCHES), threads=threads)
    async with running(rig):
        rig.put_chain([A, B, C])
        await rig.store.settle()
        rig.store.check_integrity()
        assert await rig.get([A, B, C]) == 3
        assert survivors(areas) == [C]
        assert rig.put(D)  # it goes on
        await rig.store.settle()
    assert survivors(areas) == [C, D]


@virtual_time
async def test_a_slot_that_is_used_anew_while_it_is_hashed_gets_no_seal_for_what_it_held() -> None:
    """Neither another block in the slot of the first, nor the same one that has come again."""
    areas = Areas.of(1)
    rig = slow_rig(areas)
    async with running(rig):
        assert rig.put(A)
        await asyncio.sleep(0.5)
        assert rig.put(B)  # evicts A
        assert rig.put(A)
        slot = rig.memory.slot_of(A)
        assert slot is not None
        await asyncio.sleep(0.6)
        assert rig.memory.unsealed == 1
        assert survivors(areas) == []
        await rig.store.settle()
        assert survivors(areas) == [A]


@virtual_time
async def test_a_store_that_is_behind_with_sealing_takes_no_more() -> None:
    sealing = SealOptions(delay_s=0.0, batch_bytes=2 * BLOCK, behind_bytes=3 * BLOCK)
    rig = make_rig(Areas.of(8), None, StoreOptions(sealing=sealing), threads=InlineThreads(1.0))
    async with running(rig):
        rig.put_chain([A, B, C])
        assert not rig.put(D)
        assert rig.store.stats.refused[Refusal.PRESSURE] == 1
        await asyncio.sleep(0.5)  # a batch is being hashed
        assert rig.put(D)


@virtual_time
async def test_what_goes_to_nvme_is_sealed_first(tmp_path: Path) -> None:
    """Also out of turn: the record on disk has the checksum, and verifies."""
    areas, sealing = Areas.of(8), SealOptions(delay_s=0.0, batch_bytes=BLOCK)
    options = StoreOptions(sealing=sealing)
    rig = make_rig(areas, disk_options(tmp_path, 16), options, threads=InlineThreads(1.0))
    async with running(rig):
        *others, victim, last = chain_of(1, 8)
        for key in (*others, victim):
            assert rig.put(key)
        assert await rig.get(others) == 6
        assert rig.put(last)
        await asyncio.sleep(2.5)
        assert survivors(areas) == [A, B, victim]
        await rig.store.settle()
        assert rig.disk is not None
        assert list(rig.disk) == [victim]
        assert await read_block(rig.disk, victim) == payload_of(victim)


@pytest.mark.filterwarnings("error")
@virtual_time
async def test_closing_in_the_middle_of_a_demotion_leaves_nothing_behind(tmp_path: Path) -> None:
    areas, threads = Areas.of(8), InlineThreads(1.0)
    rig = make_rig(
        areas, disk_options(tmp_path, 16), StoreOptions(sealing=BATCHES), threads=threads
    )
    keys = chain_of(1, 8)
    await rig.store.open()
    for key in keys:
        assert rig.put(key)
    await settle()
    assert rig.store._demoting
    await rig.store.close()
    assert rig.memory.pinned == 0
    rig.memory.check_integrity()
    assert set(survivors(areas)) == set(keys)


@virtual_time
async def test_claimed_blocks_are_not_lent_before_they_are_verified() -> None:
    areas = Areas.of(4)
    async with running(slow_rig(areas)) as rig:
        rig.put_chain([A, B, C])
    again = slow_rig(areas)
    await again.store.open()
    assert counts(again.memory) == {SlotState.FREE: 1, SlotState.CLAIMED: 3}
    assert await again.get([A]) == 0
    again.store.check_integrity()
    await asyncio.sleep(1.5)
    assert again.store.lookup([A, B, C]) == [Tier.CPU, Tier.CPU]
    await again.store.settle()
    assert await again.get([A, B, C]) == 3
    await again.store.close()


@virtual_time
async def test_a_block_that_comes_anew_while_it_is_claimed_is_there_once() -> None:
    areas = Areas.of(4)
    async with running(slow_rig(areas)) as rig:
        rig.put_chain([A, B])
    again = slow_rig(areas)
    await again.store.open()
    assert again.put(B)
    await again.store.settle()
    assert counts(again.memory) == {SlotState.FREE: 2, SlotState.READY: 2}
    assert await again.get([A, B]) == 2
    again.store.check_integrity()
    await again.store.close()


@virtual_time
async def test_claims_outlive_a_process_that_ends_before_it_has_verified_them() -> None:
    areas = Areas.of(8)
    async with running(slow_rig(areas)) as rig:
        rig.put_chain([A, B, C, D])
    again = slow_rig(areas)
    await again.store.open()
    await asyncio.sleep(1.5)
    await again.store.close()
    assert counts(again.memory)[SlotState.CLAIMED] == 2
    async with running(slow_rig(areas)) as third:
        assert await third.get([A, B, C, D]) == 4


@given(damage=st.lists(st.tuples(st.integers(0, 6 * BLOCK - 1), st.integers(1, 255)), max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_store_that_starts_lends_no_damaged_block(damage: Sequence[tuple[int, int]]) -> None:
    async def play() -> None:
        areas = Areas.of(6)
        keys = chain_of(1, 5)
        async with running(slow_rig(areas)) as rig:
            rig.put_chain(keys)
        for at, flip in damage:
            areas.payload[at] ^= flip
        whole = [
            areas.payload[n * BLOCK : (n + 1) * BLOCK] == payload_of(keys[n]) for n in range(5)
        ]
        async with running(slow_rig(areas)) as again:
            found = [await again.get([key]) == 1 for key in keys]  # compares every byte
            assert found == whole
            again.put_chain([key for key, good in zip(keys, whole, strict=True) if not good])
            await again.store.settle()
            assert await again.get(keys) == 5

    run_virtual(play())


async def test_hashing_happens_in_the_threads_that_are_given() -> None:
    used: list[str] = []

    class Watched(ThreadPool):
        async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
            def watched(*args: P.args, **kwargs: P.kwargs) -> T:
                used.append(threading.current_thread().name)
                return call(*args, **kwargs)

            return await super().run(watched, *args, **kwargs)

    memory = make_memory(Areas.of(4))
    sealer = Sealer(memory, Watched(1, "hashing"), BATCHES)
    sealer.open()
    slot = memory.begin(A)
    assert slot is not None
    memory.view(slot)[:] = payload_of(A)
    sealer.add(memory.commit(A))
    await sealer.close()
    assert memory.info(A) == info_of(A)
    assert used == ["hashing_0"]
