"""Handoffs that fail: both sides free everything, and say what happened."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import (
    BatonError,
    ConfigError,
    DeadlineExceeded,
    DigestMismatch,
    InternalError,
    LayoutMismatch,
    LeaseExpired,
    Overloaded,
    PeerGone,
    StaleAttempt,
    TransportError,
)
from baton.kv.handoff.leases import Ending
from baton.kv.transport.loopback import Fault
from baton.rpc.memory import MemoryDuplex, duplex_pair
from baton.tasks import OwnedTasks
from baton.types.fleet import KvLayout, Peer
from baton.types.handoff import (
    Abort,
    Attach,
    DecodeMessage,
    Expired,
    Hello,
    Prefilled,
    PrefillMessage,
    Ranges,
    Refused,
    Release,
    Renew,
)
from baton.types.request import AttemptId, WireError
from tests.unit.handoff_kit import FIRST, LAYOUT, TTL, Cluster, Plan, PrefillSide, cluster, same
from tests.virtual_time import settle, virtual_time

A = AttemptId("a", 1)
FINISHED = WireError("finished", "the first token ended the answer")


async def test_fetch_needs_its_owner() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        decode.reader._tasks = OwnedTasks()
        with pytest.raises(InternalError, match="not running"):
            await decode.fetch(A, prefill.peer, (1,))


@virtual_time
async def test_a_lease_that_nobody_renews_expires_and_a_late_attach_hears_of_it() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (1,))
        await asyncio.sleep(TTL - 0.01)
        assert not prefill.released
        await asyncio.sleep(0.02)
        assert prefill.released == [A]
        assert prefill.endings == [(A, Ending.EXPIRED)]
        prefill.publish(A, (2,))  # the engine was a step behind
        prefill.publisher.prefilled(A, FIRST, 2)
        assert prefill.released == [A, A]  # what it has leased since is given back
        with pytest.raises(LeaseExpired):
            await decode.fetch(A, prefill.peer, (1, 2))
        assert prefill.endings == [(A, Ending.EXPIRED)]


async def greet(
    c: Cluster, prefill: PrefillSide, layout: KvLayout = LAYOUT, **changes: object
) -> tuple[object, PrefillMessage]:
    """A hand-driven decode side: its end of the stream and the answer to its Hello."""
    decode = await c.decode("hand")
    dialer = c.network.handoff_dialer("hand")
    stream = await dialer.pair(prefill.address, 1.0)
    values = {
        "worker": "hand",
        "incarnation": "life1",
        "layout": layout,
        "transport": "loopback",
        "endpoint": decode.transport.endpoint(),
        "expected_incarnation": "life1",
    }
    await stream.send(Hello(**(values | changes)))  # type: ignore[arg-type]
    return stream, await stream.receive()


@virtual_time
async def test_a_reader_that_stops_renewing_is_told_that_its_lease_expired() -> None:
    async with cluster() as c:
        prefill = await c.prefill()
        stream, hello = await greet(c, prefill)
        assert isinstance(hello, Hello)
        assert hello.lease_ttl_s == TTL
        await stream.send(Attach(A))  # type: ignore[attr-defined]
        prefill.publish(A, (1,))
        await asyncio.sleep(TTL / 2)
        await stream.send(Renew((A, AttemptId("unknown"))))  # type: ignore[attr-defined]
        await asyncio.sleep(TTL - 0.01)
        assert not prefill.endings
        await asyncio.sleep(0.02)
        assert prefill.endings == [(A, Ending.EXPIRED)]
        messages = [await stream.receive(), await stream.receive()]  # type: ignore[attr-defined]
        assert isinstance(messages[0], Ranges)
        assert messages[1] == Expired(A)
        await stream.send(Release(A))  # type: ignore[attr-defined]
        await stream.send(Abort(A, "late"))  # type: ignore[attr-defined]
        await settle()
        assert prefill.endings == [(A, Ending.EXPIRED)]
        assert prefill.released == [A]


@virtual_time
async def test_lease_expiry_in_mid_read_discards_the_read() -> None:
    async with cluster(Plan(delay_s=5 * TTL)) as c:
        prefill, decode = await c.prefill(), await c.decode()
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (1,), timeout_s=1000))
        prefill.publish(A, (3,))
        prefill.publisher.prefilled(A, FIRST, 1)
        await asyncio.sleep(1)
        for task in asyncio.all_tasks():  # renewals stop, as in a worker that is stuck
            if "Pair._renew" in repr(task.get_coro()):
                task.cancel()
        with pytest.raises(LeaseExpired):
            await fetching
        assert asyncio.get_running_loop().time() < 2 * TTL + 1
        assert prefill.released == [A]
        assert decode.quarantined == [A]
        assert not decode.idle  # the transfer still writes
        await asyncio.sleep(5 * TTL)
        assert decode.idle == [A]


@virtual_time
async def test_an_aborted_fetch_keeps_its_blocks_in_quarantine_until_reads_are_idle() -> None:
    async with cluster(Plan(delay_s=7.0)) as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (3, 4))
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (1, 2)))
        await asyncio.sleep(1)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        await settle()
        assert prefill.endings == [(A, Ending.ABORTED)]
        assert prefill.released == [A]
        assert decode.quarantined == [A]
        assert not decode.idle
        await asyncio.sleep(7)
        assert decode.idle == [A]


@virtual_time
async def test_cancelling_while_waiting_for_blocks_needs_no_quarantine() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (3,))
        fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (1,), reserve_s=100))
        await asyncio.sleep(1)
        fetching.cancel()
        await asyncio.wait([fetching])
        await settle()
        assert prefill.endings == [(A, Ending.ABORTED)]
        assert not decode.quarantined
        assert not decode.idle


@virtual_time
async def test_an_error_of_reserve_reaches_the_caller_and_frees_prefill() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (3,))

        async def full() -> tuple[int, ...]:
            raise Overloaded("the pool is full")

        with pytest.raises(Overloaded):
            await decode.reader.fetch(A, prefill.peer, full, 10)
        await settle()
        assert prefill.endings == [(A, Ending.ABORTED)]


@virtual_time
async def test_a_fetch_past_its_deadline_aborts() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (3,))  # and never prefilled
        with pytest.raises(DeadlineExceeded, match="a#1"):
            await decode.fetch(A, prefill.peer, (1,), timeout_s=25)
        await settle()
        assert prefill.endings == [(A, Ending.ABORTED)]
        assert decode.idle == decode.quarantined == [A]


@virtual_time
async def test_corrupted_bytes_are_noticed() -> None:
    async with cluster(Plan(corrupt=True)) as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (3,))
        prefill.publisher.prefilled(A, FIRST, 1)
        with pytest.raises(DigestMismatch, match="p0"):
            await decode.fetch(A, prefill.peer, (1,))
        await settle()
        assert prefill.endings == [(A, Ending.ABORTED)]
        assert decode.idle == [A]


@virtual_time
async def test_a_failed_read_aborts_the_attempt_but_not_the_stream() -> None:
    plan = Plan(error="link down")
    async with cluster(plan) as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (3, 9, 5))
        with pytest.raises(TransportError, match="link down"):
            await decode.fetch(A, prefill.peer, (1, 2, 3))
        await settle()
        assert decode.idle == [A]
        plan.fault = Fault()
        retry = AttemptId("a", 2)
        prefill.publish(retry, (3, 9, 5))
        prefill.publisher.prefilled(retry, FIRST, 3)
        await decode.fetch(retry, prefill.peer, (1, 2, 3))
        assert same(decode.block(2), prefill.block(9))
        assert prefill.endings == [(A, Ending.ABORTED), (retry, Ending.RELEASED)]


@virtual_time
async def test_a_wrong_digest_at_the_release_is_refused() -> None:
    async with cluster() as c:
        prefill = await c.prefill()
        stream, _ = await greet(c, prefill)
        await stream.send(Attach(A))  # type: ignore[attr-defined]
        prefill.publish(A, (1,))
        prefill.publisher.prefilled(A, FIRST, 1)
        await stream.send(Release(A, b"wrong"))  # type: ignore[attr-defined]
        answers = [await stream.receive() for _ in range(3)]  # type: ignore[attr-defined]
        assert isinstance(answers[1], Prefilled)
        assert isinstance(answers[2], Refused)
        assert answers[2].error.code == "digest_mismatch"
        assert prefill.endings == [(A, Ending.REFUSED)]
        assert prefill.released == [A]


@virtual_time
async def test_a_release_before_the_end_of_prefill_is_refused() -> None:
    async with cluster() as c:
        prefill = await c.prefill()
        stream, _ = await greet(c, prefill)
        await stream.send(Attach(A))  # type: ignore[attr-defined]
        await stream.send(Release(A))  # type: ignore[attr-defined]
        answer = await stream.receive()  # type: ignore[attr-defined]
        assert isinstance(answer, Refused)


@pytest.mark.parametrize("early", [True, False])
def test_an_attempt_that_ends_without_handoff(early: bool) -> None:
    @virtual_time
    async def run() -> None:
        async with cluster() as c:
            prefill, decode = await c.prefill(), await c.decode()
            prefill.publish(A, (1,))
            if early:
                prefill.publisher.finish_without_handoff(A, FINISHED)
            fetching = asyncio.create_task(decode.fetch(A, prefill.peer, (1,)))
            await asyncio.sleep(1)
            prefill.publisher.finish_without_handoff(A, FINISHED)
            with pytest.raises(BatonError, match="ended the answer") as caught:
                await fetching
            assert caught.value.code == "finished"
            assert prefill.endings == [(A, Ending.REFUSED)]
            assert prefill.released == [A]

    run()


@virtual_time
async def test_stale_attempts_are_refused_and_replaced() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        prefill.publish(A, (1,))
        newer = AttemptId("a", 2)
        prefill.publish(newer, (2,))
        prefill.publisher.prefilled(newer, FIRST, 1)
        assert prefill.endings == [(A, Ending.REFUSED)]
        for stale in (A, AttemptId("a", 0)):
            with pytest.raises(StaleAttempt):
                await decode.fetch(stale, prefill.peer, (1,))
        prefill.publish(AttemptId("a", 0), (5,))  # a start that came late ends at once
        assert prefill.endings[1:] == [(AttemptId("a", 0), Ending.REFUSED)]
        await decode.fetch(newer, prefill.peer, (1,))
        with pytest.raises(StaleAttempt, match="released"):
            await decode.fetch(newer, prefill.peer, (1,))


@virtual_time
async def test_an_attempt_belongs_to_one_decode_worker() -> None:
    async with cluster() as c:
        prefill, first, second = await c.prefill(), await c.decode("d0"), await c.decode("d1")
        prefill.publish(A, (1,))
        fetching = asyncio.create_task(first.fetch(A, prefill.peer, (1,)))
        await asyncio.sleep(1)
        with pytest.raises(StaleAttempt, match="d0"):
            await second.fetch(A, prefill.peer, (1,))
        with pytest.raises(StaleAttempt, match="already"):
            await first.fetch(A, prefill.peer, (2,))
        prefill.publisher.prefilled(A, FIRST, 1)
        await fetching


@virtual_time
async def test_an_attach_whose_attempt_never_comes_is_refused_in_time() -> None:
    async with cluster() as c:
        prefill, decode = await c.prefill(), await c.decode()
        with pytest.raises(PeerGone, match="p0"):
            await decode.fetch(A, prefill.peer, (1,), timeout_s=1000)
        assert asyncio.get_running_loop().time() == pytest.approx(30)
        assert not prefill.endings  # nobody here worked on it


@virtual_time
async def test_layouts_transports_and_lives_must_match() -> None:
    async with cluster() as c:
        prefill = await c.prefill()
        other = KvLayout("fedcba9876543210", "float32", 4, 1, 8, 8)
        decode = await c.decode("d1", other)
        with pytest.raises(LayoutMismatch) as caught:
            await decode.fetch(A, prefill.peer, (1,))
        for part in ("p0", "d1", LAYOUT.describe(), other.describe(), "model, block_size"):
            assert part in caught.value.message
        _, answer = await greet(c, prefill, transport="nixl")
        assert isinstance(answer, Refused)
        assert answer.error.code == ConfigError.code
        assert "loopback" in answer.error.message
        good = await c.decode("d2")
        with pytest.raises(PeerGone, match="restarted") as gone:
            await good.fetch(A, Peer("p0", "life0", prefill.address), (1,))
        assert gone.value.retryable  # at the worker's new life, for one


@pytest.mark.parametrize("missing", ["block", "layer", "twice", "beyond", "outside"])
def test_ranges_that_do_not_cover_the_context_exactly_are_errors(missing: str) -> None:
    published = {
        "block": [(0, (1,), (0, 4))],
        "layer": [(0, (1, 2), (0, 3))],
        "twice": [(0, (1, 2), (0, 4)), (1, (2,), (3, 4))],
        "beyond": [(0, (1, 2, 3), (0, 4))],
        "outside": [(0, (1, 31 + 9), (0, 4))],
    }

    @virtual_time
    async def run() -> None:
        async with cluster() as c:
            prefill, decode = await c.prefill(), await c.decode()
            stream_side: MemoryDuplex[DecodeMessage, PrefillMessage]
            far: MemoryDuplex[PrefillMessage, DecodeMessage]
            stream_side, far = duplex_pair("d0", "p0")
            ours = next(t for t in c.fabric.members.values() if t._worker == "p0")

            async def misbehave() -> None:
                await far.receive()
                hello = Hello("p0", "life1", LAYOUT, "loopback", ours.endpoint(), 9.0)
                await far.send(hello)
                await far.receive()
                for first, blocks, layers in published[missing]:
                    await far.send(Ranges(A, first, blocks, *layers))
                await far.send(Prefilled(A, FIRST, 2))

            class Dialer:
                async def pair(self, address: str, timeout_s: float) -> object:
                    return stream_side

            decode.reader._dialer = Dialer()  # type: ignore[assignment]
            with ours.serving("d0/life1"):
                task = asyncio.create_task(misbehave())
                with pytest.raises(TransportError):
                    await decode.fetch(A, prefill.peer, (1, 2))
                await task
            await settle()
            assert decode.idle == decode.quarantined == [A]

    run()
