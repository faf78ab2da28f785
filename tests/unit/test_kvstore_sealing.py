"""Blocks become READY when they are hashed: in order, off the event loop, and only if they are
what their header says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types.kv_events import Tier
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
    info_of,
    make_memory,
    make_rig,
    payload_of,
    running,
)
from tests.virtual_time import run_virtual, virtual_time

T = TypeVar("T")
P = ParamSpec("P")

A, B, C, D = chain_of(1, 4)
IN_THREADS = SealOptions(inline_bytes=0, batch_bytes=2 * BLOCK)


class BrokenThreads(InlineThreads):
    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        raise RuntimeError("no thread today")


def slow_rig(areas: Areas, delay: float = 1.0) -> Rig:
    options = StoreOptions(sealing=IN_THREADS)
    return make_rig(areas, None, options, threads=InlineThreads(delay))


def fill(memory: MemoryTier, *keys: bytes) -> None:
    for key in keys:
        slot = memory.begin(key)
        assert slot is not None
        memory.view(slot)[:] = payload_of(key)


def counts(memory: MemoryTier) -> dict[SlotState, int]:
    return {state: count for state, count in memory.counts() if count}


@virtual_time
async def test_blocks_become_ready_in_the_order_of_commits() -> None:
    rig = slow_rig(Areas.of(8))
    async with running(rig):
        rig.put_chain([A, B, C, D])
        assert rig.store.lookup([A]) == []
        assert rig.store.begin_put(A, 0) is None  # it is on its way
        await asyncio.sleep(1.5)
        assert list(rig.memory) == [A, B]  # a batch
        rig.store.check_integrity()
        await rig.store.settle()
        assert await rig.get([A, B, C, D]) == 4
        assert rig.memory.info(A).checksum == info_of(A).checksum


@virtual_time
async def test_closing_finishes_what_was_committed() -> None:
    areas = Areas.of(4)
    async with running(slow_rig(areas)) as rig:
        rig.put_chain([A, B, C])
    assert list(rig.memory) == [A, B, C]
    async with running(slow_rig(areas)) as again:
        assert await again.get([A, B, C]) == 3


@pytest.mark.parametrize("broken", [True, False])
@virtual_time
async def test_what_cannot_be_hashed_frees_its_slot(broken: bool) -> None:
    """Also when the task is cancelled, as at the end of a loop."""
    memory = make_memory(Areas.of(4))
    sealer = Sealer(memory, BrokenThreads() if broken else InlineThreads(1.0), IN_THREADS)
    sealer.open()
    fill(memory, A, B, C)
    for key in (A, B, C):
        sealer.commit(key)
    (task,) = sealer.tasks
    await asyncio.sleep(0)
    if not broken:
        task.cancel()
    await asyncio.wait([task])
    assert counts(memory) == {SlotState.FREE: 4}
    memory.check_integrity()
    await sealer.close()


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
    sealer = Sealer(memory, Watched(1, "hashing"), IN_THREADS)
    sealer.open()
    fill(memory, A)
    sealer.commit(A)
    await sealer.close()
    assert memory.info(A) == info_of(A)
    assert used == ["hashing_0"]
