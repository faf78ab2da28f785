"""Loans that fail: nothing wrong is ever used, and both sides get their blocks back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from baton.errors import (
    DeadlineExceeded,
    DigestMismatch,
    LeaseExpired,
    PeerGone,
    TransportError,
)
from baton.kv.digest import Verify
from baton.kv.transport.loopback import Fault
from baton.rpc.memory import Fault as MessageFault
from baton.types.blocks import (
    Ask,
    BlocksHello,
    Lend,
    LendEnd,
    Offer,
    RenewLoans,
    Return,
    Returned,
)
from tests.unit.blocks_kit import OPTIONS, TTL, Plan, key, keys, world
from tests.virtual_time import settle, virtual_time, within


@dataclass
class Lose:
    """Breaks the stream at the `at`-th message of a kind, or delays all messages of a kind."""

    kind: type | None = None
    at: int = 1
    slow: tuple[type, ...] = ()
    delay_s: float = 0.0
    seen: list[str] = field(default_factory=list)

    def on_message(self, sender: str, receiver: str, message: object) -> MessageFault:
        self.seen.append(type(message).__name__)
        if isinstance(message, self.slow):
            return MessageFault(delay_s=self.delay_s)
        if self.kind is not None and isinstance(message, self.kind):
            self.at -= 1
            return MessageFault(lose=self.at == 0)
        return MessageFault()

    def on_call(self, caller: str, callee: str, method: str) -> MessageFault:
        return MessageFault()


# -- leases ----------------------------------------------------------------------------------------


@virtual_time
async def test_a_lease_that_ends_during_a_read_never_yields_a_block() -> None:
    """Renewals come late; the lender reuses its blocks while they are read."""
    late = Lose(slow=(RenewLoans,), delay_s=2 * TTL)
    async with world(Plan(delay_s=1.5 * TTL), late) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1, 2)
        store.pool.reuse = True
        with pytest.raises(LeaseExpired):
            await worker.borrow(store, [1, 2])
        assert asyncio.get_running_loop().time() >= 1.5 * TTL  # until nothing writes any more
        assert not store.pool.held
        store.pool.put(1, 2)
        worker.pool.block(0)[:] = 7
        await asyncio.sleep(5 * TTL)
        assert (worker.pool.block(0) == 7).all()


@virtual_time
async def test_a_lease_that_ends_before_the_return_arrives_voids_what_was_read() -> None:
    late = Lose(slow=(Return,), delay_s=2 * TTL)
    async with world(messages=late) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        store.pool.reuse = True
        with pytest.raises(LeaseExpired):
            await worker.borrow(store, [1])
        await asyncio.sleep(5 * TTL)
        assert late.seen.count("LoanExpired") == 1
        assert "Returned" not in late.seen


@virtual_time
async def test_a_lease_that_ends_while_the_source_still_looks_for_more() -> None:
    late = Lose(slow=(RenewLoans,), delay_s=4 * TTL)
    async with world(messages=late) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1, 2)
        store.pool.run, store.pool.pause_s = 1, 3 * TTL
        with pytest.raises(LeaseExpired):
            await worker.borrow(store, [1, 2])
        assert not store.pool.loans


@virtual_time
async def test_an_offer_whose_lease_ends_is_not_kept() -> None:
    late = Lose(slow=(RenewLoans,), delay_s=2 * TTL)
    async with world(Plan(delay_s=1.5 * TTL), late) as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        worker.pool.put(1)
        worker.pool.reuse = True
        offers = w.offers(worker, store.peer)
        offers.offer(key(1), 0)
        await asyncio.sleep(1)
        (slot,) = store.pool.reserved
        await asyncio.sleep(10 * TTL)
        assert (store.pool.committed, store.pool.aborted) == ([], [1])
        assert (store.pool.block(slot.block) == 0xEE).all()  # not written after the abort
        assert offers.counts.failed == 1


@virtual_time
async def test_the_death_of_an_offering_worker_gives_the_slots_back_at_once() -> None:
    async with world(Plan(hang=True)) as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        worker.pool.put(1)
        offers = w.offers(worker, store.peer)
        offers.offer(key(1), 0)
        await asyncio.sleep(1)
        assert store.pool.reserved
        w.network.kill("w")
        await settle()
        assert store.pool.aborted == [1]


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BlocksHello, Ask, Lend, LendEnd, RenewLoans, Return, Returned])
@pytest.mark.parametrize("at", [1, 2])
def test_a_stream_lost_at_any_message_of_a_borrow(kind: type, at: int) -> None:
    @virtual_time
    async def run() -> None:
        lose = Lose(kind, at)
        async with world(Plan(delay_s=TTL), lose) as w:
            store, worker = await w.side("s"), await w.side("w")
            store.pool.put(1, 2, 3)
            store.pool.run, store.pool.pause_s = 2, TTL
            store.pool.reuse = True
            lost = False
            try:
                await worker.borrow(store, [1, 2, 3])
            except PeerGone:
                lost = True
            assert lost == (lose.at <= 0)
            await settle()
            assert not store.pool.loans
            store.pool.put(1, 2, 3)
            await asyncio.sleep(OPTIONS.last_redial_s)
            lose.kind = None
            assert await worker.borrow(store, [1, 2, 3]) == 3  # over a new stream

    run()


@pytest.mark.parametrize("kind", [BlocksHello, Offer, RenewLoans, Return, Returned])
@pytest.mark.parametrize("at", [1, 2])
def test_a_stream_lost_at_any_message_of_an_offer(kind: type, at: int) -> None:
    @virtual_time
    async def run() -> None:
        lose = Lose(kind, at)
        async with world(Plan(delay_s=TTL), lose) as w:
            store, worker = await w.side("s", takes=True), await w.side("w")
            worker.pool.put(1, 2)
            offers = w.offers(worker, store.peer)
            offers.offer(keys(1, 2), 0)
            await asyncio.sleep(5 * TTL)
            lost = lose.at <= 0 and kind is not BlocksHello
            assert store.pool.committed == ([] if lost else [1, 2])
            assert sorted(store.pool.aborted) == ([1, 2] if lost and kind is not Offer else [])
            assert not worker.pool.loans
            offers.offer(keys(1, 2), 0)
            await asyncio.sleep(5 * TTL)
            assert store.pool.committed == [1, 2]

    run()


@virtual_time
async def test_the_death_of_a_lender_ends_its_loans_at_once_and_it_is_dialled_with_patience() -> (
    None
):
    plan = Lose()
    async with world(Plan(delay_s=TTL), plan) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        borrowing = asyncio.create_task(worker.borrow(store, [1]))
        await asyncio.sleep(1)
        w.network.kill("s:1")
        with pytest.raises(PeerGone):
            await within(1, borrowing)
        calls = 0

        def count(caller: str, callee: str, method: str) -> MessageFault:
            nonlocal calls
            calls += 1
            return MessageFault()

        plan.on_call = count  # type: ignore[method-assign]
        for _ in range(1000):  # ten seconds of requests
            with pytest.raises(PeerGone):
                await worker.borrow(store, [1])
            await asyncio.sleep(0.01)
        assert calls < 10


@virtual_time
async def test_the_death_of_a_borrower_ends_its_loans() -> None:
    async with world(Plan(delay_s=TTL)) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        borrowing = asyncio.create_task(worker.borrow(store, [1]))
        await asyncio.sleep(1)
        assert store.pool.loans
        w.network.kill("w")
        await settle()
        assert not store.pool.loans
        with pytest.raises(PeerGone):
            await borrowing


# -- giving up -------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.0, 3.0])
def test_cancellation_at_any_moment_leaves_all_books_even(delay_s: float) -> None:
    """Local blocks are somebody else's from the moment that the cancelled borrow has ended."""

    @virtual_time
    async def run() -> None:
        for steps in range(40):
            plan = Plan(delay_s=delay_s)
            async with world(plan) as w:
                store, worker = await w.side("s"), await w.side("w")
                store.pool.put(1, 2, 3)
                store.pool.run = 2
                borrowing = asyncio.create_task(worker.borrow(store, [1, 2, 3]))
                await settle(steps)
                borrowing.cancel()
                await asyncio.wait([borrowing])
                worker.pool.block(0)[:] = 7
                worker.pool.block(1)[:] = 7
                await asyncio.sleep(TTL / 2)  # no lease has run out: it was returned
                assert not store.pool.loans
                if borrowing.cancelled():
                    assert (worker.pool.block(0) == 7).all()
                    assert (worker.pool.block(1) == 7).all()

    run()


@virtual_time
async def test_a_borrow_that_is_cancelled_again_still_waits_for_its_reads() -> None:
    async with world(Plan(delay_s=4.0)) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        borrowing = asyncio.create_task(worker.borrow(store, [1]))
        await asyncio.sleep(1)
        for _ in range(3):
            borrowing.cancel()
            await settle()
            assert not borrowing.done()
        await asyncio.wait([borrowing])
        assert borrowing.cancelled()
        assert asyncio.get_running_loop().time() == pytest.approx(4)


@virtual_time
async def test_a_borrow_past_its_deadline_ends_when_its_reads_are_idle() -> None:
    async with world(Plan(delay_s=8.0)) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        with pytest.raises(DeadlineExceeded, match="s did not lend"):
            await worker.borrow(store, [1], timeout_s=2)
        assert asyncio.get_running_loop().time() == pytest.approx(8)
        await settle()
        assert not store.pool.loans


@virtual_time
async def test_reads_that_hang_cost_the_stream_not_the_blocks() -> None:
    async with world(Plan(hang=True)) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        with pytest.raises(DeadlineExceeded):
            await worker.borrow(store, [1], timeout_s=2)
        assert asyncio.get_running_loop().time() == pytest.approx(2 + OPTIONS.linger_s)
        await settle()
        assert not store.pool.loans


@virtual_time
async def test_an_offer_that_takes_too_long_is_given_up() -> None:
    async with world(Plan(hang=True)) as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        worker.pool.put(1)
        offers = w.offers(worker, store.peer)
        offers.offer(key(1), 0)
        await asyncio.sleep(OPTIONS.take_timeout_s + OPTIONS.linger_s + 1)
        assert store.pool.aborted == [1]
        assert not worker.pool.loans


@virtual_time
async def test_reserving_slots_has_a_deadline() -> None:
    async with world() as w:
        store, worker = await w.side("s", takes=True), await w.side("w")
        store.pool.reserve_s = 1e6
        worker.pool.put(1)
        offers = w.offers(worker, store.peer)
        offers.offer(key(1), 0)
        await asyncio.sleep(OPTIONS.take_timeout_s + 1)
        assert not worker.pool.loans
        assert not store.pool.aborted


# -- wrong data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [Verify.SAMPLE, Verify.FULL])
def test_corrupted_bytes_are_noticed(verify: Verify) -> None:
    @virtual_time
    async def run() -> None:
        async with world(Plan(corrupt=True)) as w:
            store = await w.side("s", takes=True, verify=verify)
            worker = await w.side("w", verify=verify)
            store.pool.put(1)
            with pytest.raises(DigestMismatch, match="s/life1"):
                await worker.borrow(store, [1])
            worker.pool.put(2, first_block=9)
            offers = w.offers(worker, store.peer)
            offers.offer(key(2), 0)
            await asyncio.sleep(1)
            assert (store.pool.committed, store.pool.aborted) == ([], [2])

    run()


@virtual_time
async def test_a_failed_read_ends_the_loan_and_not_the_stream() -> None:
    plan = Plan(error="link down")
    async with world(plan) as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        with pytest.raises(TransportError, match="link down"):
            await worker.borrow(store, [1])
        await settle()
        assert not store.pool.loans
        plan.fault = Fault()
        assert await worker.borrow(store, [1]) == 1
        assert worker.borrower.streams() == 1
