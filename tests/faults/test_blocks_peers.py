"""Peers that refuse, say nothing or make no sense: the loan or the stream ends, and no more."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import (
    BatonError,
    ConfigError,
    LayoutMismatch,
    Overloaded,
    PeerGone,
)
from baton.rpc.services import Duplex
from baton.types.blocks import (
    Ask,
    BlocksHello,
    BlocksMessage,
    BlocksRefused,
    Lend,
    LendEnd,
    LoanExpired,
    Offer,
    RenewLoans,
    Return,
    Returned,
)
from baton.types.fleet import KvLayout, Peer
from tests.unit.blocks_kit import LAYOUT, TTL, Plan, Side, World, key, world
from tests.virtual_time import settle, virtual_time, within

Stream = Duplex[BlocksMessage, BlocksMessage]


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), Overloaded("no room"), TimeoutError("a slow disk")]
)
def test_an_error_of_the_source_is_told_and_costs_nothing_else(error: Exception) -> None:
    @virtual_time
    async def run() -> None:
        async with world() as w:
            store, worker = await w.side("s"), await w.side("w")
            store.pool.put(1, 2)
            store.pool.run, store.pool.fails = 1, error
            with pytest.raises(BatonError, match=str(error)) as caught:
                await worker.borrow(store, [1, 2])
            assert isinstance(caught.value, Overloaded) == isinstance(error, Overloaded)
            await settle()
            assert not store.pool.loans
            assert await worker.borrow(store, [1]) == 1
            assert worker.borrower.streams() == 1

    run()


@virtual_time
async def test_more_open_loans_than_agreed_are_refused() -> None:
    async with world(Plan(delay_s=1.0)) as w:
        store, worker = await w.side("s", max_loans=1), await w.side("w")
        store.pool.put(1)
        slow = asyncio.create_task(worker.borrow(store, [1], [5]))
        await settle()
        with pytest.raises(Overloaded):
            await worker.borrow(store, [1], [6])
        assert await slow == 1


@virtual_time
async def test_layouts_transports_and_lives_must_match() -> None:
    async with world() as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        other = KvLayout("fedcba9876543210", "float32", 4, 1, 8, 8)
        misfit = await w.side("x", layout=other)
        with pytest.raises(LayoutMismatch, match="model, block_size"):
            await misfit.borrower.borrow(store.peer, key(1), [1], timeout_s=1)
        old = Peer("s", "life0", store.peer.address)
        with pytest.raises(PeerGone, match="restarted"):
            await worker.borrower.borrow(old, key(1), [1], timeout_s=1)
        _, answer = await greet(w, store, worker, transport="nixl")
        assert isinstance(answer, BlocksRefused)
        assert answer.error.code == ConfigError.code
        assert await worker.borrow(store, [1]) == 1


@virtual_time
async def test_a_silent_peer_is_not_waited_for() -> None:
    class Silent:
        async def pair(self, stream: Stream) -> None:
            await stream.receive()
            with pytest.raises(PeerGone):
                await stream.receive()

    async with world() as w:
        store, worker = await w.side("s"), await w.side("w")
        silent = await w.network.blocks_dialer("hand").pair(store.peer.address, 1)
        with pytest.raises(PeerGone):
            await within(60, silent.receive())
        w.network.add_blocks("s:1", Silent())
        with pytest.raises(PeerGone, match="in time"):
            await worker.borrow(store, [1])


async def greet(
    w: World, store: Side, worker: Side, **changes: object
) -> tuple[Stream, BlocksMessage]:
    """A hand-driven dialing side, and the answer to its greeting."""
    stream = await w.network.blocks_dialer("hand").pair(store.peer.address, 1)
    values: dict[str, object] = {
        "name": "hand",
        "incarnation": "life1",
        "layout": LAYOUT,
        "transport": "loopback",
        "endpoint": worker.transport.endpoint(),
        "lease_ttl_s": TTL,
        "expected_incarnation": "life1",
    }
    await stream.send(BlocksHello(**(values | changes)))  # type: ignore[arg-type]
    return stream, await stream.receive()


@pytest.mark.parametrize(
    "nonsense",
    [
        Ask(1, b""),
        Ask(1, b"short"),
        Offer(1, key(1), ()),
        Offer(1, key(1), (1, 2)),
        Offer(1, key(1), (1,), parent=b"short"),
        Offer(1, key(1), (1,), 0, (b"", b"")),
        Lend(1, 0, (1,)),
        LendEnd(1, 0),
        BlocksRefused(None, error=None),  # type: ignore[arg-type]
    ],
)
def test_a_dialing_side_that_makes_no_sense_loses_its_stream(nonsense: BlocksMessage) -> None:
    @virtual_time
    async def run() -> None:
        async with world() as w:
            store, worker = await w.side("s", takes=True), await w.side("w")
            stream, hello = await greet(w, store, worker)
            assert isinstance(hello, BlocksHello)
            await stream.send(nonsense)
            answer = await within(1, stream.receive())
            assert isinstance(answer, BlocksRefused)
            assert answer.number is None
            with pytest.raises(PeerGone):
                await within(1, stream.receive())

    run()


@pytest.mark.parametrize(
    "nonsense",
    [
        Lend(1, 1, (1,)),  # a gap
        Lend(1, 0, ()),
        Lend(1, 0, (1, 2, 3)),  # more than was asked
        Lend(1, 0, (10**6,)),  # outside of its pool
        Lend(1, 0, (1,), (b"?",)),
        LendEnd(1, 1),
        Returned(1),
        Ask(1, key(1)),
        Return(1),
        RenewLoans((1,)),
    ],
)
def test_a_lender_that_makes_no_sense_fails_the_loan(nonsense: BlocksMessage) -> None:
    class Liar:
        def __init__(self, hello: BlocksHello) -> None:
            self.hello = hello

        async def pair(self, stream: Stream) -> None:
            try:
                await stream.receive()
                await stream.send(self.hello)
                await stream.receive()
                await stream.send(nonsense)
                await stream.send(LendEnd(1, 1))
                while True:
                    await stream.receive()
            except PeerGone:
                return

    @virtual_time
    async def run() -> None:
        async with world() as w:
            store, worker = await w.side("s"), await w.side("w")
            endpoint = store.transport.endpoint()
            hello = BlocksHello("s", "life1", LAYOUT, "loopback", endpoint, TTL)
            w.network.add_blocks("s:1", Liar(hello))
            with store.transport.serving("w/life1"), pytest.raises(BatonError):
                await within(30, worker.borrow(store, [1, 2]))

    run()


@virtual_time
async def test_a_late_word_about_a_loan_that_has_ended_is_ignored() -> None:
    async with world() as w:
        store, worker = await w.side("s"), await w.side("w")
        store.pool.put(1)
        stream, _ = await greet(w, store, worker)
        await stream.send(Ask(1, key(1)))
        assert isinstance(await stream.receive(), Lend)
        assert await stream.receive() == LendEnd(1, 1)
        assert await within(2 * TTL, stream.receive()) == LoanExpired(1)
        for late in (Return(1), RenewLoans((1, 7)), Returned(3), LoanExpired(4)):
            await stream.send(late)
        await stream.send(Ask(2, key(1)))
        assert isinstance(await stream.receive(), Lend)
        assert await stream.receive() == LendEnd(2, 1)
        await stream.send(Return(2))
        assert await stream.receive() == Returned(2)
        await stream.aclose()


@virtual_time
async def test_a_caller_that_takes_no_answers_is_not_listened_to_for_ever() -> None:
    async with world() as w:
        store, worker = await w.side("s"), await w.side("w")
        stream, _ = await greet(w, store, worker)

        async def ask_for_ever() -> None:
            for number in range(10**6):
                await stream.send(Ask(number, key(1)))

        with pytest.raises(TimeoutError):
            await within(TTL, ask_for_ever())
        await stream.aclose()
