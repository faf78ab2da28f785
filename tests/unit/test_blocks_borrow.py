"""Borrowing that works: whole runs, parts of them, misses, layers in order, several at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import InternalError
from baton.kv.digest import Verify
from baton.types.fleet import Peer
from tests.unit.blocks_kit import OPTIONS, TTL, Plan, keys, world
from tests.virtual_time import virtual_time, within


@pytest.mark.parametrize("verify", Verify)
def test_what_is_lent_arrives_and_the_loan_ends(verify: Verify) -> None:
    @virtual_time
    async def run() -> None:
        async with world(options=replace(OPTIONS, verify=verify)) as w:
            store, worker = await w.side("s"), await w.side("w")
            store.pool.put(*range(10, 20), first_block=3)
            assert await worker.borrow(store, range(10, 20)) == 10
            assert not store.pool.loans
            assert store.pool.lent == 1

    run()


@virtual_time
async def test_the_leading_run_is_lent_and_a_miss_is_nothing() -> None:
    async with world() as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1, 2, 4)
        assert await worker.borrow(store, [1, 2, 3, 4], [9, 5, 7, 3]) == 2
        assert await worker.borrow(store, [3, 4]) == 0
        assert await worker.borrow(store, []) == 0
        assert worker.borrower.streams() == 1  # one for all
        with pytest.raises(InternalError):
            await worker.borrower.borrow(store.peer, keys(1, 2), [1], timeout_s=1)


@virtual_time
async def test_layers_come_in_order_over_all_blocks_that_are_there_at_once() -> None:
    async with world(Plan(delay_s=1.0)) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(*range(8))
        told: list[tuple[int, int]] = []
        count = await worker.borrow(
            store, range(8), layer_groups=2, on_layers=lambda *said: told.append(said)
        )
        assert count == 8
        assert told == [(8, 2), (8, 4)]


@virtual_time
async def test_what_comes_from_a_slow_tier_is_read_after_what_is_there() -> None:
    async with world() as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(*range(8))
        store.pool.run, store.pool.pause_s = 3, 5.0
        told: list[tuple[int, int]] = []
        count = await worker.borrow(
            store, range(8), layer_groups=9, on_layers=lambda *said: told.append(said)
        )
        assert count == 8
        assert told == [(blocks, layer) for blocks in (3, 6, 8) for layer in (1, 2, 3, 4)]


@virtual_time
async def test_a_loan_is_renewed_as_long_as_its_reads_take() -> None:
    async with world(Plan(delay_s=5 * TTL)) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1, 2)
        assert await worker.borrow(store, [1, 2], timeout_s=20 * TTL) == 2


@virtual_time
async def test_many_loans_run_at_a_time_in_both_directions_of_a_pair() -> None:
    async with world(Plan(delay_s=1.0)) as w:
        one, other = await w.side("a"), await w.side("b")
        one.pool.put(*range(20))
        other.pool.put(*range(20, 40))
        borrows = [other.borrow(one, [n], [n + 30]) for n in range(20)]
        borrows += [one.borrow(other, [n + 20], [n + 30]) for n in range(20)]
        assert await within(3, asyncio.gather(*borrows)) == [1] * 40


@virtual_time
async def test_one_block_can_be_lent_to_many() -> None:
    async with world(Plan(delay_s=1.0)) as w:
        store = await w.side("s")
        store.pool.put(1)
        store.pool.reuse = True
        workers = [await w.side(f"w{n}") for n in range(3)]
        borrows = [worker.borrow(store, [1]) for worker in workers]
        assert await asyncio.gather(*borrows) == [1, 1, 1]


@virtual_time
async def test_a_source_may_be_known_by_its_address_only() -> None:
    async with world() as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        somebody = Peer("", "", store.peer.address)
        count = await worker.borrower.borrow(somebody, keys(1), [4], timeout_s=1)
        assert count == 1
