"""Handoff and blocks streams with a peer that makes no sense, in virtual time, from both sides.

Each case is what the peer says, in whatever order, and how long it waits in between. Nothing but
BatonErrors may come of it; afterwards nothing is held, nothing was logged as an error, and a peer
that makes sense is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from baton.errors import BatonError, PeerGone
from baton.rpc.codec_blocks import blocks_from_pb, blocks_to_pb
from baton.rpc.codec_handoff import decode_from_pb, decode_to_pb, prefill_from_pb, prefill_to_pb
from baton.rpc.services import Duplex
from baton.types.blocks import (
    Ask,
    BlocksHello,
    BlocksRefused,
    Lend,
    LendEnd,
    LoanExpired,
    Offer,
    RenewLoans,
    Return,
    Returned,
)
from baton.types.fleet import Peer
from baton.types.handoff import (
    Abort,
    Attach,
    Expired,
    Hello,
    Prefilled,
    Ranges,
    Refused,
    Release,
    Released,
    Renew,
)
from baton.types.request import AttemptId, WireError
from tests.fuzz.campaign import Campaign, ErrorLog
from tests.fuzz.messages import Odd, greeted
from tests.unit import blocks_kit, handoff_kit
from tests.unit.blocks_kit import Slot, World, keys, world
from tests.unit.handoff_kit import FIRST, LAYOUT, Cluster, cluster
from tests.virtual_time import run_virtual, settle, within

CPU_S = 3.0  # of one case, which lasts milliseconds
A, B, C = AttemptId("a"), AttemptId("b", 2), AttemptId("c")
LATER_S = 300.0  # by then every lease, timeout and lingering has ended
ERROR = WireError("overloaded", "no room", retryable=True)

Script = list[bytes | float]
"""Messages of the peer, and seconds that it says nothing."""

pauses = st.sampled_from([0.0, 0.1, 4.0, 11.0, 31.0])


def scripts(odd: Odd, hello: Any) -> st.SearchStrategy[Script]:
    @st.composite
    def build(draw: Any) -> Script:
        script: Script = list(draw(greeted(odd, hello)))
        for _ in range(draw(st.integers(0, 3))):
            script.insert(draw(st.integers(0, len(script))), draw(pauses))
        return script

    return build()


@contextlib.contextmanager
def bounded_cpu() -> Iterator[None]:
    """Virtual time never passes in a loop that has something to do for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"one case took {CPU_S} s of CPU")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


async def say(stream: Duplex[Any, Any], script: Script, parse: Callable[[bytes], Any]) -> None:
    """As a peer does whose messages come over gRPC: one that cannot be decoded ends the stream."""
    with contextlib.suppress(PeerGone):
        for item in script:
            if isinstance(item, float):
                await asyncio.sleep(item)
                continue
            try:
                message = parse(item)
            except Exception:  # see `WireDuplex`: any
                break
            await stream.send(message)
            await settle(3)
    await stream.aclose()


async def hear(stream: Duplex[Any, Any]) -> None:
    """Take whatever comes until the stream ends."""
    with contextlib.suppress(PeerGone):
        while True:
            await stream.receive()


class Says:
    """A service that talks by a script to whoever dials."""

    def __init__(self, script: Script, parse: Callable[[bytes], Any]) -> None:
        self._script = script
        self._parse = parse

    async def pair(self, stream: Duplex[Any, Any]) -> None:
        hearing = asyncio.create_task(hear(stream))
        await say(stream, self._script, self._parse)
        await hearing


# -- handoff ---------------------------------------------------------------------------------------


def _decode(raw: bytes) -> Any:
    return decode_from_pb(type(decode_to_pb(Attach(A))).FromString(raw))


def _prefill(raw: bytes) -> Any:
    return prefill_from_pb(type(prefill_to_pb(Released(A))).FromString(raw))


def test_what_decode_workers_say(campaign: Campaign, errors: ErrorLog) -> None:
    hello = Hello("evil", "life1", LAYOUT, "loopback", b"evil", 0.0, "life1")
    said = [
        hello,
        Attach(A),
        Attach(B),
        Attach(C),
        Renew((A, B)),
        Release(A),
        Release(B, b"d" * 16),
    ]
    odd = Odd([decode_to_pb(message) for message in [*said, Abort(A, "gone")]])

    def case(script: Script) -> None:
        with bounded_cpu():
            run_virtual(_against_publisher(script))
        errors.check()

    campaign.run(scripts(odd, decode_to_pb(hello)), case, examples=60)


async def _against_publisher(script: Script) -> None:
    async with cluster() as c:
        prefill = await c.prefill()
        evil, _ = await c._transport("evil")
        c.fabric.members[b"evil"] = evil
        for attempt, blocks in ((A, (1, 2)), (B, (3,))):
            prefill.publish(attempt, blocks)
        prefill.publisher.prefilled(A, FIRST, 2)
        stream = await c.network.handoff_dialer("evil").pair(prefill.address, 1.0)
        hearing = asyncio.create_task(hear(stream))
        await say(stream, script, _decode)
        await hearing
        await asyncio.sleep(LATER_S)
        assert not prefill.publisher.live()
        assert sorted(map(str, prefill.released)) == [str(A), str(B)]
        assert len({attempt for attempt, _ in prefill.endings}) == len(prefill.endings)
        prefill.publisher.check_integrity()
        assert not prefill.publisher._pairs
        await _hand_over(c, prefill)
        del c.fabric.members[b"evil"]


async def _hand_over(c: Cluster, prefill: handoff_kit.PrefillSide) -> None:
    """Between two that make sense."""
    decode, attempt = await c.decode("good"), AttemptId("good")
    prefill.publish(attempt, (7, 8))
    prefill.publisher.prefilled(attempt, FIRST, 2)
    await within(5, decode.fetch(attempt, prefill.peer, (1, 2)))
    assert handoff_kit.same(decode.block(1), prefill.block(7))


def test_what_prefill_workers_say(campaign: Campaign, errors: ErrorLog) -> None:
    hello = Hello("evil", "life1", LAYOUT, "loopback", b"evil", 10.0)
    said = [
        hello,
        Ranges(A, 0, (3, 4), 0, 4),
        Ranges(A, 0, (3, 4), 0, 2),
        Ranges(A, 0, (3, 4), 2, 4),
    ]
    said += [Ranges(B, 0, (5,), 0, 4), Prefilled(A, FIRST, 2), Prefilled(B, FIRST, 1)]
    said += [Released(A), Released(B), Expired(A), Refused(A, ERROR), Refused(None, ERROR)]
    odd = Odd([prefill_to_pb(message) for message in said])

    def case(script: Script) -> None:
        with bounded_cpu():
            run_virtual(_against_reader(script))
        errors.check()

    campaign.run(scripts(odd, prefill_to_pb(hello)), case, examples=60)


async def _against_reader(script: Script) -> None:
    async with cluster() as c:
        decode = await c.decode()
        evil, _ = await c._transport("evil")
        c.fabric.members[b"evil"] = evil
        c.network.add_handoff("evil:1", Says([0.0, *script], _prefill))
        peer = Peer("evil", "life1", "evil:1")
        fetches = [
            asyncio.create_task(decode.fetch(attempt, peer, blocks, timeout_s=60, reserve_s=wait))
            for attempt, blocks, wait in ((A, (1, 2), 0.0), (B, (3,), 5.0))
        ]
        with evil.serving("d0/life1"):
            await asyncio.wait(fetches, timeout=LATER_S)
            for fetch in fetches:
                assert fetch.done()
                assert fetch.exception() is None or isinstance(fetch.exception(), BatonError)
            await asyncio.sleep(LATER_S)
        assert sorted(map(str, decode.quarantined)) == sorted(map(str, decode.idle))
        assert not decode.reader._pairs
        prefill, attempt = await c.prefill(), AttemptId("good")
        prefill.publish(attempt, (7, 8))
        prefill.publisher.prefilled(attempt, FIRST, 2)
        await within(5, decode.fetch(attempt, prefill.peer, (1, 2)))
        del c.fabric.members[b"evil"]


# -- blocks ----------------------------------------------------------------------------------------


def _blocks(raw: bytes) -> Any:
    return blocks_from_pb(type(blocks_to_pb(Return(1))).FromString(raw))


def _blocks_messages(expected: str) -> tuple[list[Any], Any]:
    layout = blocks_kit.LAYOUT
    hello = BlocksHello("evil", "life1", layout, "loopback", b"evil", 10.0, expected)
    said = [hello, Ask(1, keys(1, 2)), Ask(2, keys(3)), Ask(3, keys(9)), Return(1), Return(2)]
    said += [Offer(1, keys(5, 6), (1, 2), 0, ()), Offer(2, keys(7), (3,), 2, (), 60.0)]
    said += [RenewLoans((1, 2)), Returned(1), Returned(2), LoanExpired(1)]
    said += [
        Lend(1, 0, (1, 2), ()),
        Lend(1, 0, (1,), ()),
        Lend(1, 1, (2,), ()),
        Lend(2, 0, (3,), ()),
    ]
    said += [LendEnd(1, 2), LendEnd(2, 1), LendEnd(2, 0)]
    said += [BlocksRefused(1, ERROR), BlocksRefused(None, ERROR)]
    return [blocks_to_pb(message) for message in said], blocks_to_pb(hello)


def test_what_borrowers_and_offerers_say(campaign: Campaign, errors: ErrorLog) -> None:
    said, hello = _blocks_messages("life1")

    def case(script: Script) -> None:
        with bounded_cpu():
            run_virtual(_against_server(script))
        errors.check()

    campaign.run(scripts(Odd(said), hello), case, examples=60)


async def _against_server(script: Script) -> None:
    async with world() as w:
        store = await _side(w, "s")
        evil = await w.side("evil")
        w.fabric.members[b"evil"] = evil.transport  # type: ignore[assignment]
        stream = await w.network.blocks_dialer("evil").pair(store.peer.address, 1.0)
        hearing = asyncio.create_task(hear(stream))
        with evil.transport.serving("s/life1"):
            await say(stream, script, _blocks)
            await hearing
            await asyncio.sleep(LATER_S)
        store.pool.check_even()
        assert not store.shared._connections
        good = await w.side("good")
        assert await within(5, good.borrow(store, [1, 2])) == 2
        del w.fabric.members[b"evil"]


def test_what_lenders_and_stores_say(campaign: Campaign, errors: ErrorLog) -> None:
    said, hello = _blocks_messages("")

    def case(script: Script) -> None:
        with bounded_cpu():
            run_virtual(_against_borrower(script))
        errors.check()

    campaign.run(scripts(Odd(said), hello), case, examples=60)


async def _against_borrower(script: Script) -> None:
    async with world() as w:
        worker = await _side(w, "w")
        evil = await w.side("evil")
        w.fabric.members[b"evil"] = evil.transport  # type: ignore[assignment]
        w.network.add_blocks("evil:1", Says(script, _blocks))
        offers = w.offers(worker, evil.peer)
        offers.offer(keys(1, 2), 0)
        offers.offer(keys(3), 2, keys(2), 60.0)
        borrowed = [
            asyncio.create_task(
                worker.borrower.borrow(evil.peer, keys(*wanted), place, timeout_s=60)
            )
            for wanted, place in (((11, 12), (11, 12)), ((13,), (13,)))
        ]
        with evil.transport.serving("w/life1"):
            await asyncio.wait(borrowed, timeout=LATER_S)
            for one in borrowed:
                assert one.done()
                assert one.exception() is None or isinstance(one.exception(), BatonError)
            w.running[-1].cancel()  # the offers, which dial again and again
            await asyncio.sleep(LATER_S)
        worker.pool.check_even()
        assert not worker.shared._connections
        store = await _side(w, "s")
        assert await within(5, worker.borrow(store, [1, 2], [14, 15])) == 2
        del w.fabric.members[b"evil"]


async def _side(w: World, name: str) -> blocks_kit.Side:
    """With blocks 1 to 4. What it takes from others it does not look at: they are trusted to offer
    what they say, unless there are digests."""
    side = await w.side(name, takes=True)
    side.pool.put(1, 2, 3, 4)

    def commit(slot: Slot) -> None:
        side.pool.reserved.remove(slot)
        side.pool.committed.append(int.from_bytes(slot.key, "big"))

    side.pool.commit = commit  # type: ignore[method-assign]
    return side
