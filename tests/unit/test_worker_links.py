"""The worker's end of the links: ownership, grouping, staleness, draining, closing."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import Overloaded, PeerGone, WorkerLost, WorkerMoved
from baton.rpc.memory import Fault
from baton.types.fleet import Role, WorkerLoad
from baton.types.link import (
    Cancel,
    Drain,
    SetRole,
    StepReport,
)
from baton.types.request import (
    AttemptId,
    AttemptOutput,
)
from baton.worker.links import OTHERS_S
from tests.unit.links_kit import DONE, error_of, receive, rig, start, token
from tests.virtual_time import settle, virtual_time


async def test_outputs_of_one_step_go_in_one_message_per_conductor() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        a, b, c = AttemptId("a"), AttemptId("b"), AttemptId("c")
        for stream, attempt in ((one, a), (two, b), (one, c)):
            await r.begin(stream, attempt)
        r.duty.load = WorkerLoad(running=3)
        r.links.report((token(a), token(b), token(c)))
        assert await receive(one) == StepReport((token(a), token(c)), WorkerLoad(running=3))
        assert await receive(two) == StepReport((token(b),), WorkerLoad(running=3))


async def test_nothing_follows_a_finish() -> None:
    async with rig() as r:
        stream = await r.connect()
        a, b = AttemptId("a"), AttemptId("b")
        await r.begin(stream, a)
        await r.begin(stream, b)
        r.links.report((token(a, 0, DONE),))
        r.links.report((token(a, 1), token(b)))
        r.links.report((AttemptOutput(AttemptId("never started"), finish=DONE),))
        assert (await receive(stream)).outputs == (token(a, 0, DONE), token(b))


async def test_cancel_reaches_the_duty_only_from_the_owner() -> None:
    async with rig() as r:
        owner, other = await r.connect(), await r.connect()
        a = AttemptId("a")
        await r.begin(owner, a)
        r.duty.called.clear()
        await other.send(Cancel(a, "not mine"))
        await other.send(Cancel(AttemptId("unknown"), "x"))
        await owner.send(Cancel(a, "changed my mind"))
        await owner.send(Cancel(AttemptId("last"), "x"))
        await r.call()
        assert r.duty.cancelled == [(a, "changed my mind")]


async def test_a_refused_start_is_a_finish_with_the_error() -> None:
    async with rig() as r:
        stream = await r.connect()
        a = AttemptId("a")
        r.duty.refuse = Overloaded("queue is full")
        await stream.send(start(a))
        assert await error_of(stream, a) == "overloaded"
        r.duty.refuse = ValueError("bug")
        await stream.send(start(a))
        assert await error_of(stream, a) == "internal_error"
        r.duty.refuse = None
        await r.begin(stream, a)  # the failed ones left nothing behind


async def test_a_newer_attempt_replaces_an_older_one_and_not_the_other_way_round() -> None:
    async with rig() as r:
        stream = await r.connect()
        first, second = AttemptId("a", 1), AttemptId("a", 2)
        await r.begin(stream, first)
        await r.begin(stream, second)
        assert await error_of(stream, first) == "stale_attempt"
        assert [attempt for attempt, _ in r.duty.cancelled] == [first]
        for stale in (first, second):
            await stream.send(start(stale))
            assert await error_of(stream, stale) == "stale_attempt"
        r.links.report((token(second, 0, DONE),))
        assert (await receive(stream)).outputs == (token(second, 0, DONE),)


async def test_an_attempt_of_another_conductor_takes_the_request_over() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        first, second = AttemptId("a", 1), AttemptId("a", 64)
        await r.begin(one, first)
        await r.begin(two, second)
        assert await error_of(one, first) == "taken_over"
        await one.send(start(AttemptId("a", 2)))
        assert await error_of(one, AttemptId("a", 2)) == "stale_attempt"


async def test_the_end_of_a_link_cancels_what_was_begun_on_it() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await r.begin(one, AttemptId("a"))
        await r.begin(two, AttemptId("b"))
        r.duty.called.clear()
        await one.aclose()
        await r.call()
        assert [attempt for attempt, _ in r.duty.cancelled] == [AttemptId("a")]
        await r.begin(two, AttemptId("a"))  # it belongs to nobody any more


async def test_a_changed_load_is_told_once() -> None:
    async with rig() as r:
        stream = await r.connect()
        r.links.load_changed()  # nothing to say
        await asyncio.sleep(0)
        r.duty.load = WorkerLoad(waiting=2)
        r.links.load_changed()
        r.links.load_changed()
        assert await receive(stream) == StepReport((), WorkerLoad(waiting=2))
        await r.begin(stream, AttemptId("a"))
        r.links.report((token(AttemptId("a")),))
        assert (await receive(stream)).outputs == (token(AttemptId("a")),)


@virtual_time
async def test_conductors_hear_soon_what_attempts_of_others_did_to_the_load() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await r.begin(one, AttemptId("a"))
        r.duty.load = WorkerLoad(running=1)
        for index in range(3):
            r.links.report((token(AttemptId("a"), index),))
            await receive(one)
        assert await receive(two) == StepReport((), WorkerLoad(running=1))
        assert asyncio.get_running_loop().time() == pytest.approx(OTHERS_S)


async def test_what_a_forgotten_attempt_did_to_the_load_is_told() -> None:
    """Found by the fault harness: its link had gone, and others never heard of its end."""
    async with rig() as r:
        stream = await r.connect()
        r.duty.load = WorkerLoad(waiting=2)
        r.links.report((token(AttemptId("unknown")),))
        assert await receive(stream) == StepReport((), WorkerLoad(waiting=2))


@pytest.mark.parametrize("by_message", [True, False])
async def test_draining_refuses_new_attempts_and_waits_for_the_rest(by_message: bool) -> None:
    async with rig() as r:
        stream = await r.connect()
        a, b = AttemptId("a"), AttemptId("b")
        await r.links.wait_idle()
        await r.begin(stream, a)
        if by_message:
            await stream.send(Drain())
        else:
            r.links.drain()
        await stream.send(start(b))
        # Retryable, and not "overloaded": that ends a request that has no other worker to try.
        assert await error_of(stream, b) == "worker_lost"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(r.links.wait_idle(), 0.01)
        r.links.report((token(a, 0, DONE),))
        await asyncio.wait_for(r.links.wait_idle(), 5)


async def test_a_role_is_taken_by_whoever_can_have_it() -> None:
    async with rig() as r:
        stream = await r.connect()
        await stream.send(SetRole(Role.DECODE))
        await r.begin(stream, AttemptId("a"))  # what comes behind it has been read, too
        assert not r.links.role_wanted.is_set()
        r.links.other_roles = frozenset({Role.DECODE})
        await stream.send(SetRole(Role.PREFILL))
        await stream.send(SetRole(Role.DECODE))
        await asyncio.wait_for(r.links.role_wanted.wait(), 5)
        assert r.links.wanted_role is Role.DECODE


async def test_abandoned_attempts_get_a_retryable_error_before_the_links_close() -> None:
    async with rig() as r:
        stream = await r.connect()
        a = AttemptId("a")
        await r.begin(stream, a)
        r.links.abandon(WorkerLost("shutting down"))
        assert [attempt for attempt, _ in r.duty.cancelled] == [a]
        await r.links.aclose()
        assert await error_of(stream, a) == "worker_lost"
        with pytest.raises(PeerGone):
            await receive(stream)


async def test_only_answers_that_have_begun_are_abandoned_for_another_role() -> None:
    async with rig() as r:
        stream = await r.connect()
        begun, waits = AttemptId("begun"), AttemptId("waits")
        await r.begin(stream, begun)
        await r.begin(stream, waits)
        r.links.report((token(begun),))
        await receive(stream)
        r.links.abandon_decodes(WorkerMoved("another role"))
        assert [attempt for attempt, _ in r.duty.cancelled] == [begun]
        assert r.links.attempts == (waits,)
        assert await error_of(stream, begun) == "worker_moved"


async def test_the_last_words_do_not_overtake_what_is_being_sent() -> None:
    async with rig() as r:
        stream = await r.connect()
        a = AttemptId("a")
        await r.begin(stream, a)
        for index in range(100):  # more than the stream holds: the writer waits for room
            r.links.report((token(a, index),))
            await settle(5)
        r.links.report((token(a, 100, DONE),))
        closing = asyncio.create_task(r.links.aclose())
        await asyncio.sleep(0)
        seen: list[int] = []
        while not seen or seen[-1] != 100:
            outputs = (await receive(stream)).outputs
            seen += [t.index for output in outputs for t in output.tokens]
        assert seen == list(range(101))
        await closing


async def test_a_report_that_cannot_be_sent_ends_the_link() -> None:
    async with rig() as r:
        stream = await r.connect()
        a = AttemptId("a")
        await r.begin(stream, a)
        r.network.plan.on_message = unsendable  # type: ignore[method-assign]
        r.duty.load = WorkerLoad(running=1)
        r.links.load_changed()
        with pytest.raises(PeerGone):
            await receive(stream)
        await settle()
        assert [attempt for attempt, _ in r.duty.cancelled] == [a]


def unsendable(sender: str, receiver: str, message: object) -> Fault:
    """As a codec fails on a value that the wire cannot carry."""
    raise ValueError("this cannot be encoded")


async def test_a_slow_conductor_gets_fewer_larger_messages() -> None:
    async with rig() as r:
        stream = await r.connect()
        a = AttemptId("a")
        await r.begin(stream, a)
        for index in range(500):
            r.links.report((token(a, index),))
            await asyncio.sleep(0)
        seen: list[int] = []
        messages = 0
        while len(seen) < 500:
            messages += 1
            seen += [t.index for output in (await receive(stream)).outputs for t in output.tokens]
        assert seen == list(range(500))
        assert messages < 100
