"""Offers: a store reads what it wants of them, and a worker never waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import InternalError
from baton.kv.blocks.taker import Slot
from baton.kv.digest import Verify
from baton.types.blocks import BlocksHello, BlocksRefused, Offer
from baton.types.fleet import Peer
from tests.unit.blocks_kit import LAYOUT, OPTIONS, TTL, Plan, key, keys, world
from tests.virtual_time import settle, virtual_time


@virtual_time
async def test_a_store_hears_how_long_blocks_are_to_stay() -> None:
    async with world() as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        worker.pool.put(1, 2, 3)
        store.pool.put(1)
        offers = w.offers(worker, store.peer)
        offers.offer(keys(1, 2), 0, pin_s=60.0)
        offers.offer(key(3), 2, key(2))
        await asyncio.sleep(1)
        assert store.pool.parents == [b"", key(2)]
        assert store.pool.pins == [(1, 60.0), (2, 60.0)]
        assert sorted(store.pool.committed) == [2, 3]


@pytest.mark.parametrize("pin_s", [0.0, -1.0, 86_401.0, float("nan")])
def test_a_pin_of_no_sense_ends_the_stream(pin_s: float) -> None:
    @virtual_time
    async def run() -> None:
        async with world() as w:
            store, worker = await w.side("s", takes=True), await w.side("w")
            worker.pool.put(1)
            offers = w.offers(worker, store.peer)
            offers.offer(key(1), 0, pin_s=pin_s)
            await asyncio.sleep(1)
            assert offers.counts.failed == 1
            assert store.pool.committed == []

    run()


@pytest.mark.parametrize("verify", Verify)
def test_a_store_takes_what_it_lacks(verify: Verify) -> None:
    @virtual_time
    async def run() -> None:
        async with world(options=replace(OPTIONS, verify=verify)) as w:
            store, worker = await w.side("s", takes=True), await w.side("w")
            worker.pool.put(*range(10))
            store.pool.put(2, 3, first_block=40)
            offers = w.offers(worker, Peer("", "", store.peer.address))
            offers.offer(keys(*range(5)), 0)
            offers.offer(keys(*range(5, 10)), 5)
            await asyncio.sleep(1)
            assert sorted(store.pool.committed) == [0, 1, 4, 5, 6, 7, 8, 9]
            assert offers.counts.read == 2
            other = await w.side("x")
            assert await other.borrow(store, range(10)) == 10

    run()


@virtual_time
async def test_what_a_store_does_not_want_is_returned_unread() -> None:
    async with world(Plan(hang=True)) as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        store.pool.wants = lambda number: False
        worker.pool.put(1)
        offers = w.offers(worker, store.peer)
        offers.offer(key(1), 0)
        await asyncio.sleep(1)
        assert offers.counts.read == 1
        assert not worker.pool.loans


@virtual_time
async def test_blocks_that_are_gone_when_their_turn_comes_are_left_out() -> None:
    async with world() as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        worker.pool.put(1, 2)
        offers = w.offers(worker, store.peer)
        offers.offer(keys(1, 2, 3), 0)
        offers.offer(key(9), 0)
        await asyncio.sleep(1)
        assert store.pool.committed == [1, 2]
        assert (offers.counts.read, offers.counts.gone) == (1, 1)
        with pytest.raises(InternalError):
            offers.offer(b"short", 0)
        with pytest.raises(InternalError):
            offers.offer(key(2), 1, b"short")


@virtual_time
async def test_under_pressure_the_oldest_offers_are_dropped() -> None:
    async with world(Plan(delay_s=1.0)) as w:
        store = await w.side("s", takes=True)
        worker = await w.side("w", max_offers=2, max_queued_offers=4)
        worker.pool.put(*range(20))
        offers = w.offers(worker, store.peer)
        for number in range(20):
            offers.offer(key(number), 0)
        await settle()
        assert offers.counts.dropped == 16
        assert len(worker.pool.loans) == 2  # under way; nothing else is leased
        await asyncio.sleep(5)
        assert sorted(store.pool.committed) == [16, 17, 18, 19]


@virtual_time
async def test_a_lease_is_renewed_as_long_as_the_store_reads() -> None:
    async with world(Plan(delay_s=2.5 * TTL)) as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        worker.pool.put(1)
        offers = w.offers(worker, store.peer)
        offers.offer(key(1), 0)
        await asyncio.sleep(3 * TTL)
        assert store.pool.committed == [1]


@virtual_time
async def test_a_worker_refuses_offers() -> None:
    async with world() as w:
        other, worker = await w.side("x"), await w.side("w")
        worker.pool.put(1)
        offers = w.offers(worker, other.peer)
        offers.offer(key(1), 0)
        await asyncio.sleep(1)
        assert offers.counts.failed == 1
        assert not worker.pool.loans


@virtual_time
async def test_a_store_that_comes_later_is_found() -> None:
    async with world() as w:
        worker = await w.side("w")
        worker.pool.put(1, 2)
        offers = w.offers(worker, Peer("", "", "s:1"))
        offers.offer(key(1), 0)
        await asyncio.sleep(60)
        store = await w.side("s", takes=True)
        await asyncio.sleep(OPTIONS.last_redial_s + 1)
        assert store.pool.committed == [1]
        w.network.kill("s:1")
        await settle()
        offers.offer(key(2), 0)
        again = await w.side("s", takes=True, incarnation="life2")
        await asyncio.sleep(OPTIONS.last_redial_s + 1)
        assert again.pool.committed == [2]


@virtual_time
async def test_more_open_offers_than_agreed_are_refused() -> None:
    async with world(Plan(delay_s=1.0)) as w:
        store = await w.side("s", takes=True, max_loans=1)
        worker = await w.side("w")
        stream = await w.network.blocks_dialer("w").pair(store.peer.address, 1)
        endpoint = worker.transport.endpoint()
        hello = BlocksHello("w", "life1", LAYOUT, "loopback", endpoint, TTL, "life1")
        await stream.send(hello)
        assert isinstance(await stream.receive(), BlocksHello)
        for number in (1, 2):
            await stream.send(Offer(number, key(number), (number,)))
        answer = await stream.receive()
        assert isinstance(answer, BlocksRefused)
        assert (answer.number, answer.error.code) == (2, "overloaded")
        await stream.aclose()


@virtual_time
async def test_a_slot_that_cannot_be_committed_costs_the_others_nothing() -> None:
    async with world() as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        worker.pool.put(1, 2)
        commit = store.pool.commit

        def fail_once(slot: Slot) -> None:
            if slot.index == 0:
                store.pool.reserved.remove(slot)
                raise ValueError("a bug")
            commit(slot)

        store.pool.commit = fail_once  # type: ignore[method-assign]
        offers = w.offers(worker, store.peer)
        offers.offer(keys(1, 2), 0)
        await asyncio.sleep(1)
        assert store.pool.committed == [2]


@pytest.mark.parametrize("later", range(12))
def test_offering_ends_when_it_is_cancelled_while_its_stream_breaks(later: int) -> None:
    """A task group that is ending because of an error keeps a cancellation to itself."""

    @virtual_time
    async def run() -> None:
        async with world() as w:
            store, worker = await w.side("s", takes=True), await w.side("w")
            w.offers(worker, store.peer)
            await asyncio.sleep(1)
            w.network.cut("w", store.peer.address)
            for _ in range(later):
                await asyncio.sleep(0)
            (offering,) = w.running[-1:]
            offering.cancel()
            _, late = await asyncio.wait([offering], timeout=5.0)
            assert not late

    run()
