"""Streams that break or never begin: both sides free what was attached, and go on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import DeadlineExceeded, PeerGone, TransportError
from baton.kv.handoff.leases import Ending
from baton.kv.transport.loopback import Fault, LoopbackTransport
from baton.rpc.memory import Fault as MessageFault
from baton.rpc.services import Duplex
from baton.types.fleet import Peer
from baton.types.handoff import Attach, DecodeMessage, Hello, PrefillMessage, Ranges, Refused
from baton.types.request import AttemptId
from tests.unit.handoff_kit import FIRST, LAYOUT, OPTIONS, Cluster, Plan, PrefillSide, cluster, same
from tests.virtual_time import settle, virtual_time, within

A = AttemptId("a", 1)


@virtual_time
async def test_killing_prefill_fails_all_fetches_and_ends_their_quarantine() -> None:
    async with cluster(Plan(hang=True)) as c:
        prefill, decode = await c.prefill(), await c.decode()
        attempts = [AttemptId(f"r{n}") for n in range(4)]
        for n, attempt in enumerate(attempts):
            prefill.publish(attempt, (n,))
        fetches = [
            asyncio.create_task(decode.fetch(a, prefill.peer, (n,))) for n, a in enumerate(attempts)
        ]
        await asyncio.sleep(1)
        c.network.kill(prefill.address)
        done, _ = await asyncio.wait(fetches, timeout=5)
        assert [type(f.exception()) for f in done] == [PeerGone] * 4
        await settle()
        assert sorted(map(str, decode.idle)) == sorted(map(str, attempts))
        assert {how for _, how in prefill.endings} == {Ending.ABORTED}
        assert not prefill.publisher.live()
        with pytest.raises(PeerGone):
            await decode.fetch(attempts[0], prefill.peer, (1,))


@virtual_time
async def test_killing_decode_frees_everything_it_had_attached() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        other = AttemptId("other")
        for attempt in (A, other):
            prefill.publish(attempt, (1,))
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (1,)))
        await asyncio.sleep(1)
        c.network.kill("d0")
        await settle()
        assert prefill.endings == [(A, Ending.ABORTED)]
        assert prefill.released == [A]
        assert prefill.publisher.live() == (other,)  # nobody had attached it; its lease runs
        with pytest.raises(PeerGone):
            await fetching


@virtual_time
async def test_a_worker_that_dials_again_gets_a_working_stream() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (1,)))
        await asyncio.sleep(1)
        service = prefill
        c.network.kill("d0")  # the connection, seen from both ends; the process lives on
        with pytest.raises(PeerGone):
            await fetching
        c.network.add_handoff(prefill.address, service)
        again = AttemptId("a", 2)
        prefill.publish(again, (4,))
        prefill.publisher.prefilled(again, FIRST, 1)
        await within(5, decode.fetch(again, prefill.peer, (1,)))
        assert same(decode.block(1), prefill.block(4))


class Stuck:
    """Reads from one source hang, the others' succeed."""

    def __init__(self, source: str) -> None:
        self.source = source

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        return Fault(hang=source.startswith(self.source))


@virtual_time
async def test_a_peer_that_stands_still_holds_up_no_reads_from_others() -> None:
    async with cluster(Stuck("p0"), replace(OPTIONS, max_reads=1)) as c:
        stuck, other, decode = await c.prefill("p0"), await c.prefill("p1"), await c.decode()
        stuck.publish(A, (1,))
        hanging = asyncio.create_task(decode.fetch(A, stuck.peer, (1,)))
        await asyncio.sleep(1)
        attempt = AttemptId("b")
        other.publish(attempt, (2,))
        other.publisher.prefilled(attempt, FIRST, 1)
        await within(5, decode.fetch(attempt, other.peer, (2,)))
        hanging.cancel()
        c.network.kill("p0:1")


@virtual_time
async def test_reads_that_hang_after_they_were_given_up_cost_the_stream_not_the_blocks() -> None:
    async with cluster(Plan(hang=True)) as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (1,))
        with pytest.raises(DeadlineExceeded):
            await decode.fetch(A, prefill.peer, (1,), timeout_s=1)
        await asyncio.sleep(OPTIONS.linger_s - 1)
        assert (decode.quarantined, decode.idle) == ([A], [])
        await asyncio.sleep(2)
        assert decode.idle == [A]


@virtual_time
async def test_a_message_that_cannot_be_sent_ends_the_stream() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (1,)))
        await asyncio.sleep(1)

        def unsendable(sender: str, receiver: str, message: object) -> MessageFault:
            if isinstance(message, Ranges):
                raise ValueError("this cannot be encoded")
            return MessageFault()

        c.network.plan.on_message = unsendable  # type: ignore[method-assign]
        prefill.publish(A, (1,))
        with pytest.raises(PeerGone):
            await within(5, fetching)
        assert prefill.endings == [(A, Ending.ABORTED)]


@virtual_time
async def test_a_stream_must_begin_with_hello_in_time() -> None:
    async with cluster() as c:
        prefill = await c.prefill()
        dialer = c.network.handoff_dialer("hand")
        rude = await dialer.pair(prefill.address, 1.0)
        await rude.send(Attach(A))
        answer = await rude.receive()
        assert isinstance(answer, Refused)
        assert answer.attempt is None
        silent = await dialer.pair(prefill.address, 1.0)
        with pytest.raises(PeerGone):
            await within(60, silent.receive())
        assert asyncio.get_running_loop().time() == pytest.approx(10)


def hello_of(transport: LoopbackTransport) -> Hello:
    endpoint = transport.endpoint()
    return Hello("hand", "life1", LAYOUT, "loopback", endpoint, expected_incarnation="life1")


async def dial(c: Cluster, prefill: PrefillSide) -> Duplex[DecodeMessage, PrefillMessage]:
    return await c.network.handoff_dialer("hand").pair(prefill.address, 1.0)


def transport_of(c: Cluster, worker: str) -> LoopbackTransport:
    return next(t for t in c.fabric.members.values() if t._worker == worker)


@virtual_time
async def test_a_decode_worker_that_goes_during_the_greeting_is_forgotten() -> None:
    async with cluster() as c:
        prefill, hand = await c.prefill(), (await c.decode("hand")).transport
        stream = await dial(c, prefill)
        await stream.send(hello_of(hand))
        await stream.aclose()
        await settle()
        assert transport_of(c, "p0")._peers == {}


@virtual_time
async def test_an_old_stream_that_ends_late_leaves_the_new_ones_connection_alone() -> None:
    async with cluster() as c:
        prefill, hand = await c.prefill(), (await c.decode("hand")).transport
        ours = transport_of(c, "p0")
        old, new = await dial(c, prefill), await dial(c, prefill)
        await old.send(hello_of(hand))
        await old.receive()
        connect = ours.connect

        async def connect_while_the_old_one_ends(peer: str, endpoint: bytes) -> None:
            await connect(peer, endpoint)
            await old.aclose()
            await settle()

        ours.connect = connect_while_the_old_one_ends  # type: ignore[method-assign]
        await new.send(hello_of(hand))
        assert isinstance(await new.receive(), Hello)
        assert list(ours._peers) == ["hand/life1"]
        await new.aclose()
        await settle()
        assert ours._peers == {}


@virtual_time
async def test_a_wrong_address_of_a_worker_does_not_cut_the_stream_to_it() -> None:
    """Found by fuzzing: the failed dial disconnected the transport from that life of the worker,
    and every handoff over the stream that stood failed from then on."""
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()

        async def hand_over(name: str, peer: Peer) -> None:
            attempt = AttemptId(name)
            prefill.publish(attempt, (4,))
            prefill.publisher.prefilled(attempt, FIRST, 1)
            await within(5, decode.fetch(attempt, peer, (1,)))

        elsewhere = replace(prefill.peer, address="nobody:1")
        with pytest.raises(PeerGone):
            await hand_over("a", elsewhere)
        await hand_over("b", prefill.peer)
        await hand_over("c", elsewhere)  # there is a stream to that life
        await hand_over("d", prefill.peer)
        c.network.kill("d0")


class Leases:
    """A prefill worker that greets with leases of `ttl_s`."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s

    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        await stream.receive()
        await stream.send(Hello("p9", "life1", LAYOUT, "loopback", b"", self.ttl_s))
        with pytest.raises(PeerGone):
            await stream.receive()


@pytest.mark.parametrize("ttl_s", [float("nan"), float("inf"), 0.0, -1.0, 1e-9, 1e300])
def test_a_lease_that_cannot_be_renewed_in_time_is_refused(ttl_s: float) -> None:
    """Found by fuzzing: a time to live that is no number, or nearly none, was renewed without a
    pause; nothing else ran any more."""

    @virtual_time
    async def run() -> None:
        async with cluster() as c:
            decode = await c.decode()
            c.network.add_handoff("p9:1", Leases(ttl_s))
            with pytest.raises(TransportError, match="greeting"):
                await decode.fetch(A, Peer("p9", "life1", "p9:1"), (1,))

    run()
