"""Attempts whose conductor has gone: who may take them over, and until when. Virtual time."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import WorkerLost
from baton.types.link import Adopt, Cancel, StartDecode, StartPrefill, StepReport
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    SamplingParams,
)
from baton.worker.links import ORPHAN_S
from baton.worker.tails import LINGER_S
from tests.unit.links_kit import DONE, Link, Rig, error_of, receive, rig, token
from tests.virtual_time import VirtualTimeLoop, settle, virtual_time

A, B = AttemptId("a", 1), AttemptId("b", 1)


def first(*ids: int, finish: Finish | None = None) -> AttemptOutput:
    """What an adopter is told of A: all its tokens."""
    tokens = tuple(SampledToken(token_id, index) for index, token_id in enumerate(ids))
    return AttemptOutput(A, tokens, finish)


async def decoding(r: Rig, stream: Link, attempt: AttemptId = A, tokens: int = 2) -> None:
    """Begin the attempt, and let it produce; its conductor has heard of that."""
    await r.begin(stream, attempt)
    for index in range(tokens):
        r.links.report((token(attempt, index),))
    assert (await receive(stream)).outputs == tuple(token(attempt, i) for i in range(tokens))


async def adopt(r: Rig, stream: Link, attempt: AttemptId = A) -> AttemptOutput:
    await stream.send(Adopt(attempt))
    (output,) = (await receive(stream)).outputs
    assert output.attempt == attempt
    return output


@virtual_time
async def test_another_conductor_gets_every_token_and_all_that_follows() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        await one.aclose()
        await settle()
        r.links.report((token(A, 2),))  # it goes on meanwhile
        assert await adopt(r, two) == first(7, 7, 7)
        r.links.report((token(A, 3),))
        assert (await receive(two)).outputs == (token(A, 3),)
        await asyncio.sleep(2 * ORPHAN_S)
        r.links.report((token(A, 4, DONE),))
        assert (await receive(two)).outputs == (token(A, 4, DONE),)
        assert r.duty.cancelled == []
        await asyncio.wait_for(r.links.wait_idle(), 1)


@virtual_time
async def test_a_first_token_from_elsewhere_and_a_resumed_answer_belong_to_it() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        r.duty.called.clear()
        await one.send(StartDecode(GenerationTask(A, (1, 2), SamplingParams(), output=(3, 4))))
        await r.call()
        r.links.begun(A, SampledToken(5, 2))
        await one.aclose()
        await settle()
        r.links.report((token(A, 3),))
        assert await adopt(r, two) == first(3, 4, 5, 7)


@virtual_time
async def test_an_orphan_that_nobody_adopts_is_cancelled_in_time() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        await one.aclose()
        await asyncio.sleep(ORPHAN_S - 0.1)
        assert r.duty.cancelled == []
        with pytest.raises(TimeoutError):  # it is work that the worker has
            await asyncio.wait_for(r.links.wait_idle(), 0.01)
        await asyncio.sleep(0.2)
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]
        await asyncio.wait_for(r.links.wait_idle(), 1)
        r.links.report((token(A, 2),))  # a step that was in flight
        output = await adopt(r, two)
        assert output.tokens == first(7, 7).tokens  # to go on from elsewhere
        assert output.finish is not None
        assert output.finish.error is not None
        assert (output.finish.error.code, output.finish.error.retryable) == ("worker_lost", True)


@virtual_time
async def test_what_does_not_decode_yet_is_cancelled_at_once() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await r.begin(one, A)
        r.duty.called.clear()
        resumed = GenerationTask(B, (1, 2), SamplingParams(), output=(3,))
        await one.send(StartDecode(resumed))
        await r.call()
        await one.send(StartPrefill(GenerationTask(AttemptId("p"), (1,), SamplingParams())))
        await settle()
        r.links.report((token(AttemptId("p")),))  # a prefill worker's first token
        await one.aclose()
        await settle()
        assert {attempt for attempt, _ in r.duty.cancelled} == {A, B, AttemptId("p")}
        await asyncio.wait_for(r.links.wait_idle(), 1)
        for attempt in (A, B, AttemptId("p")):
            await two.send(Adopt(attempt))
            assert await error_of(two, attempt) == "unknown_attempt"


@virtual_time
async def test_no_orphans_where_they_are_turned_off() -> None:
    async with rig(orphan_timeout_s=0.0) as r:
        one = await r.connect()
        await decoding(r, one)
        await one.aclose()
        await settle()
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]


@virtual_time
async def test_an_answer_that_ended_without_a_conductor_is_adopted_with_its_end() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        await one.aclose()
        await settle()
        r.links.report((token(A, 2, DONE),))
        await asyncio.wait_for(r.links.wait_idle(), 1)
        await asyncio.sleep(LINGER_S - 1)
        assert await adopt(r, two) == first(7, 7, 7, finish=DONE)
        await asyncio.sleep(1)
        await two.send(Adopt(A))
        assert await error_of(two, A) == "unknown_attempt"
        assert r.duty.cancelled == []


@virtual_time
async def test_an_end_that_was_told_can_be_asked_for_again() -> None:
    """Its conductor may be gone before its client has heard of it."""
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        r.links.report((token(A, 2, DONE),))
        assert (await receive(one)).outputs == (token(A, 2, DONE),)
        assert await adopt(r, two) == first(7, 7, 7, finish=DONE)


@virtual_time
async def test_a_cancelled_answer_is_forgotten() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        r.duty.called.clear()
        await one.send(Cancel(A, "the client has gone"))
        await r.call()
        await one.aclose()  # before the engine has said that it is cancelled
        await settle()
        r.links.report((AttemptOutput(A, finish=Finish(FinishReason.CANCELLED)),))
        await asyncio.wait_for(r.links.wait_idle(), 1)
        await two.send(Adopt(A))
        assert await error_of(two, A) == "unknown_attempt"
        assert asyncio.get_running_loop().time() < 1


@virtual_time
async def test_a_conductor_that_comes_back_ends_an_orphan_that_it_does_not_need() -> None:
    async with rig() as r:
        one = await r.connect()
        await decoding(r, one)
        await one.aclose()
        await settle()
        again = await r.connect()
        r.duty.called.clear()
        await again.send(Cancel(A, "it goes on elsewhere"))
        await r.call()
        assert r.duty.cancelled == [(A, "it goes on elsewhere")]
        r.links.report((AttemptOutput(A, finish=Finish(FinishReason.CANCELLED)),))
        await asyncio.wait_for(r.links.wait_idle(), 1)
        await asyncio.sleep(2 * ORPHAN_S)
        assert len(r.duty.cancelled) == 1


@virtual_time
async def test_a_conductor_that_is_only_cut_off_learns_that_it_was_replaced() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        assert await adopt(r, two) == first(7, 7)
        assert await error_of(one, A) == "taken_over"
        await one.send(Cancel(A, "not mine any more"))
        await one.aclose()
        await settle()
        assert r.duty.cancelled == []
        r.duty.called.clear()
        await two.send(Cancel(A, "mine"))
        await r.call()
        assert r.duty.cancelled == [(A, "mine")]


@virtual_time
async def test_the_second_of_two_adopters_has_it() -> None:
    async with rig() as r:
        one, two, three = [await r.connect() for _ in range(3)]
        await decoding(r, one)
        await one.aclose()
        await settle()
        assert await adopt(r, two) == first(7, 7)
        assert await adopt(r, three) == first(7, 7)
        assert await error_of(two, A) == "taken_over"
        r.links.report((token(A, 2, DONE),))
        assert (await receive(three)).outputs == (token(A, 2, DONE),)


@virtual_time
async def test_who_has_it_may_ask_again() -> None:
    async with rig() as r:
        one = await r.connect()
        await decoding(r, one)
        assert await adopt(r, one) == first(7, 7)
        r.links.report((token(A, 2, DONE),))
        assert (await receive(one)).outputs == (token(A, 2, DONE),)


@virtual_time
async def test_what_its_own_conductor_still_has_to_read_may_be_adopted_before_it_decodes() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await r.begin(one, A)
        assert await adopt(r, two) == first()
        assert await error_of(one, A) == "taken_over"
        r.links.report((token(A, 0, DONE),))
        assert (await receive(two)).outputs == (token(A, 0, DONE),)


@virtual_time
async def test_an_adopter_that_goes_leaves_an_orphan_again() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        await one.aclose()
        await asyncio.sleep(ORPHAN_S - 1)
        await adopt(r, two)
        await two.aclose()
        await asyncio.sleep(ORPHAN_S - 1)
        assert r.duty.cancelled == []
        await asyncio.sleep(2)
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]


@virtual_time
async def test_a_newer_attempt_ends_an_orphan() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        await one.aclose()
        await settle()
        newer = AttemptId("a", 2)
        await r.begin(two, newer)
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]
        for stale in (A, AttemptId("a", 0)):
            await two.send(Adopt(stale))
            assert await error_of(two, stale) == "stale_attempt"
        await asyncio.sleep(2 * ORPHAN_S)  # the orphan's timer is gone with it
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]


@pytest.mark.parametrize("by_another", [True, False])
@virtual_time
async def test_an_attempt_that_was_replaced_is_forgotten(by_another: bool) -> None:
    """Its record may be the one that is found when its successor has gone, too."""
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        newer, owner = AttemptId("a", 2), two if by_another else one
        await r.begin(owner, newer)
        assert await error_of(one, A) == ("taken_over" if by_another else "stale_attempt")
        gone = AttemptOutput(newer, finish=Finish(FinishReason.CANCELLED))
        r.links.report((gone,))
        assert (await receive(owner)).outputs == (gone,)
        await two.send(Adopt(A))
        assert await error_of(two, A) == "unknown_attempt"


@virtual_time
async def test_a_worker_that_drains_waits_for_orphans_and_lets_them_be_adopted() -> None:
    async with rig() as r:
        one, two = await r.connect(), await r.connect()
        await decoding(r, one)
        r.links.drain()
        await one.aclose()
        await settle()
        assert await adopt(r, two) == first(7, 7)
        r.links.report((token(A, 2, DONE),))
        await asyncio.wait_for(r.links.wait_idle(), 1)


@pytest.mark.parametrize("abandon", [True, False])
@virtual_time
async def test_shutdown_cancels_orphans_and_their_timers(abandon: bool) -> None:
    async with rig() as r:
        one = await r.connect()
        await decoding(r, one)
        await one.aclose()
        await settle()
        if abandon:
            r.links.abandon(WorkerLost("shutting down"))
        await r.links.aclose()
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]
        await asyncio.wait_for(r.links.wait_idle(), 1)
        await asyncio.sleep(2 * ORPHAN_S)
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]


@virtual_time
async def test_a_link_that_the_worker_closes_leaves_no_orphans() -> None:
    async with rig() as r:
        one = await r.connect()
        await decoding(r, one)
        await r.links.aclose()
        await settle()
        assert [attempt for attempt, _ in r.duty.cancelled] == [A]
        await asyncio.wait_for(r.links.wait_idle(), 1)


class Adoption(RuleBasedStateMachine):
    """One attempt of a deterministic engine, and conductors that come, go and adopt.

    Whoever has it sees a gapless answer from 0; an end is told once to each who has it; an attempt
    that nobody has for ORPHAN_S is cancelled, and never one that somebody has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self.context = rig()
        self.r = self.runner.run(self.context.__aenter__())
        self.conductors = [self.runner.run(self.r.connect()) for _ in range(2)]
        self.seen: dict[Link, list[int]] = {}
        self.ended: set[Link] = set()
        self.owner: Link | None = self.conductors[0]
        self.alone_since: float | None = None
        self.produced = 0
        self.over = False
        self.runner.run(self.r.begin(self.conductors[0], A))
        self.report()

    def now(self) -> float:
        return self.runner.get_loop().time()

    def report(self, finish: Finish | None = None) -> None:
        async def say() -> None:
            self.r.links.report((token(A, self.produced, finish),))
            await settle()

        self.runner.run(say())
        self.produced += 1

    @rule()
    @precondition(lambda self: not self.over)
    def produce(self) -> None:
        self.report()

    @rule()
    @precondition(lambda self: not self.over)
    def finish(self) -> None:
        self.report(DONE)
        self.over = True

    @rule(which=st.integers(0, 1))
    def adopt(self, which: int) -> None:
        stream = self.conductors[which]
        self.seen[stream] = []
        self.ended.discard(stream)

        async def ask() -> None:
            await stream.send(Adopt(A))
            await settle()

        self.runner.run(ask())
        if not self.over:
            self.owner, self.alone_since = stream, None

    @rule(which=st.integers(0, 1))
    def reconnect(self, which: int) -> None:
        old = self.conductors[which]

        async def again() -> Link:
            await old.aclose()
            await settle()
            return await self.r.connect()

        self.conductors[which] = self.runner.run(again())
        if self.owner is old:
            self.owner, self.alone_since = None, self.now()

    @rule(seconds=st.sampled_from([1.0, 7.0]))
    def wait(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @invariant()
    def books_agree(self) -> None:
        alone = self.alone_since is not None and self.now() - self.alone_since >= ORPHAN_S
        cancelled = [attempt for attempt, _ in self.r.duty.cancelled]
        assert cancelled == ([A] if alone and not self.finished_first() else [])
        if alone:
            self.over = True
        for stream in self.conductors:
            self.runner.run(self.read(stream))

    def finished_first(self) -> bool:
        return self.over and not self.r.duty.cancelled

    async def read(self, stream: Link) -> None:
        seen = self.seen.setdefault(stream, [])
        while True:
            try:
                async with asyncio.timeout(0.001):
                    report = await stream.receive()
            except TimeoutError:
                return
            assert isinstance(report, StepReport)
            for output in report.outputs:
                seen += [each.index for each in output.tokens]
                assert seen == list(range(len(seen)))
                if output.finish is not None:
                    assert stream not in self.ended
                    self.ended.add(stream)

    def teardown(self) -> None:
        async def close() -> None:
            await self.r.links.aclose()
            await asyncio.wait_for(self.r.links.wait_idle(), 1)
            await self.context.__aexit__(None, None, None)

        self.runner.run(close())
        self.runner.close()


TestAdoption = Adoption.TestCase
TestAdoption.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
