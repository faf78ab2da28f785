"""Steps that are scheduled while the one before them is in flight."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from baton.engine.batch import Batch, BatchItem, SampleRequest, resolve
from baton.engine.sequence import Ending
from baton.errors import InternalError
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, FinishReason, SamplingParams
from tests import engine_rig
from tests.engine_rig import Faulty, Gate, running
from tests.fake_runner import QueueRunner, expected_answer, expected_for
from tests.scheduler_rig import CANCELLED, Rig, make_rig, make_task, shape

FAILED = Ending(FinishReason.ERROR)


def schedule(rig: Rig) -> Batch:
    batch = rig.scheduler.schedule(0.0)
    assert batch is not None
    return batch


def active(rig: Rig) -> int:
    return dict(rig.pool.counts())[BlockState.ACTIVE]


# -- what such a step contains --------------------------------------------------------------


def test_a_decode_follows_the_token_of_the_step_in_flight() -> None:
    rig = make_rig()
    rig.submit(make_task(6))
    prefill, decode = schedule(rig), schedule(rig)
    (item,) = decode.items
    assert (item.tokens, item.start, item.length, item.follows) == ((), 6, 1, True)
    assert item.sample is not None
    assert item.sample.index == 1
    assert decode.num_tokens == 1
    rig.commit(prefill)
    rig.commit(decode)
    rig.drain()
    assert len(rig.answers[1]) == 4


def test_chunks_go_on_while_the_one_before_is_computed() -> None:
    rig = make_rig(max_batch_tokens=8)
    rig.submit(make_task(20))
    first = schedule(rig)
    assert shape(first) == [(1, 0, 8)]
    second = schedule(rig)
    assert shape(second) == [(1, 8, 8)]
    rig.commit(first)
    third = schedule(rig)
    assert shape(third) == [(1, 16, 4)]
    assert not third.items[0].follows
    rig.commit(second)
    rig.commit(third)
    rig.drain()
    task = make_task(20)
    assert rig.answers[1] == expected_answer(task.prompt, task.sampling)


@pytest.mark.parametrize(
    ("length", "settings", "hand_off"),
    [
        (4, {}, False),  # max_tokens=1
        (63, {"max_model_len": 64, "max_batch_tokens": 64}, False),
        (8, {"num_blocks": 2}, False),  # the next token has no place in the whole pool
        (8, {}, True),  # the next token is another worker's
    ],
)
def test_nothing_is_scheduled_beyond_a_known_end(
    length: int, settings: dict[str, int], hand_off: bool
) -> None:
    rig = make_rig(**settings)
    rig.submit(make_task(length, 1 if length == 4 else 9), hand_off)
    only = rig.schedule()
    assert only is not None
    assert rig.scheduler.schedule(0.0) is None
    rig.commit(only)
    assert rig.scheduler.schedule(0.0) is None


def test_the_place_of_one_that_ends_is_taken_in_the_next_step() -> None:
    rig = make_rig(max_num_seqs=1)
    rig.submit(make_task(4, max_tokens=1))
    rig.submit(make_task(4, max_tokens=1, start=100))
    first, second = schedule(rig), schedule(rig)
    assert (shape(first), shape(second)) == ([(1, 0, 4)], [(2, 0, 4)])
    rig.commit(first)
    rig.commit(second)
    assert set(rig.endings) == {1, 2}


def test_a_reservation_gets_its_place_only_when_it_is_free() -> None:
    rig = make_rig(max_num_seqs=1)
    rig.submit(make_task(4, max_tokens=1))
    first = schedule(rig)
    reservation = rig.reserve(1)
    assert rig.scheduler.schedule(0.0) is None
    assert not reservation.blocks
    rig.commit(first)
    assert rig.scheduler.schedule(0.0) is None
    assert reservation.blocks
    rig.scheduler.drop_reservation(reservation)


def test_penalties_get_the_token_that_they_lack_from_the_runner() -> None:
    rig = make_rig()
    task = make_task(5, 6)
    task = replace(task, sampling=replace(task.sampling, repetition_penalty=1.5))
    rig.submit(task)
    first, second = schedule(rig), schedule(rig)
    assert second.items[0].sample is not None
    assert second.items[0].sample.output == ()
    rig.commit(first)
    rig.commit(second)  # the fake runner checks that penalties see the whole context
    rig.drain()
    assert rig.answers[1] == expected_answer(task.prompt, task.sampling)


def test_what_follows_is_resolved_by_the_last_tokens() -> None:
    plain = SampleRequest(SamplingParams(), 3, ())
    penalized = SampleRequest(SamplingParams(presence_penalty=1.0), 3, (), (5,), (6, 7))
    known = BatchItem(1, (9,), 4, (0, 1), plain)
    items = (
        known,
        BatchItem(2, (), 4, (2, 3), plain, follows=True),
        BatchItem(3, (), 4, (4, 5), penalized, follows=True),
    )
    resolved = resolve(Batch(1, items), {1: 10, 2: 20, 3: 30}).items
    assert resolved[0] is known
    assert resolved[1] == BatchItem(2, (20,), 4, (2, 3), plain)
    assert resolved[2].tokens == (30,)
    assert resolved[2].sample == penalized._replace(output=(6, 7, 30))
    with pytest.raises(InternalError, match="not sampled"):
        resolve(Batch(1, items), {1: 10, 2: 20})


# -- endings that nobody expected -----------------------------------------------------------


def test_blocks_stay_until_the_last_step_that_writes_to_them() -> None:
    task = make_task(7, 9)
    stop = expected_answer(task.prompt, task.sampling)[0]
    rig = make_rig(num_blocks=3, eos_token_ids=(stop,))
    rig.submit(task)
    waiting = rig.reserve(3)
    first, second = schedule(rig), schedule(rig)
    (advance,) = rig.commit(first)
    assert advance.ending == Ending(FinishReason.STOP)
    assert (active(rig), waiting.blocks) == (2, ()), "the second step still writes"
    assert rig.scheduler.load().running == 0
    assert rig.commit(second) == (), "what came after the end is nobody's"
    assert active(rig) == 0
    rig.scheduler.grant_reservations()
    assert len(waiting.blocks) == 3
    rig.scheduler.drop_reservation(waiting)


def test_nobody_makes_way_while_a_step_is_in_flight() -> None:
    rig = make_rig(num_blocks=6)
    rig.submit(make_task(8, 16))
    victim = rig.submit(make_task(4, 16, 100))
    flying = schedule(rig)
    while (batch := rig.scheduler.schedule(0.0)) is not None:
        assert victim.preemptions == 0
        rig.commit(flying)
        flying = batch
    assert victim.steps == 1
    rig.commit(flying)
    schedule(rig)
    assert victim.preemptions == 1


def test_a_cancelled_sequence_is_in_no_further_step() -> None:
    rig = make_rig()
    sequence = rig.submit(make_task(6))
    first = schedule(rig)
    rig.cancel(sequence)
    assert not rig.endings
    assert rig.scheduler.schedule(0.0) is None
    rig.commit(first)
    assert rig.endings == {1: CANCELLED}
    assert active(rig) == 0


# -- steps that do not count ----------------------------------------------------------------


def test_a_step_that_was_withdrawn_can_be_scheduled_again() -> None:
    rig = make_rig(max_batch_tokens=8)
    rig.submit(make_task(14))
    first, second = schedule(rig), schedule(rig)
    assert rig.scheduler.withdraw(second) == ()
    rig.submit(make_task(2, start=100, priority=-1))
    assert shape(schedule(rig)) == [(2, 0, 2), *shape(second)]
    assert first.step == 1


def test_cancelled_before_the_only_step_was_launched() -> None:
    rig = make_rig()
    rig.submit(make_task(4, max_tokens=1))
    first = schedule(rig)
    newcomer = rig.submit(make_task(4, start=100))
    second = schedule(rig)
    rig.cancel(newcomer)
    assert not rig.endings
    rig.record(rig.scheduler.withdraw(second))
    assert rig.endings == {2: CANCELLED}
    rig.commit(first)


def test_the_step_behind_a_failed_one_ends_nobody_else() -> None:
    rig = make_rig()
    rig.submit(make_task(4, 9))
    first = schedule(rig)
    rig.submit(make_task(5, 2, start=100))
    second = schedule(rig)
    rig.record(rig.scheduler.discard(first, FAILED))
    assert rig.endings == {1: FAILED}
    assert active(rig) == 2 + 2
    rig.record(rig.scheduler.withdraw(second))
    assert active(rig) == 2
    rig.drain()
    task = make_task(5, 2, start=100)
    assert rig.answers[2] == expected_answer(task.prompt, task.sampling)


# -- with the loop --------------------------------------------------------------------------


async def test_what_comes_while_a_step_runs_is_in_the_next_one() -> None:
    gate = Gate()
    async with running(engine_rig.make_rig(before_step=gate)) as rig:
        long, new = engine_rig.make_task("long"), engine_rig.make_task("new", 3)
        rig.engine.submit(long)
        await gate.reached()
        rig.engine.submit(new)
        await asyncio.sleep(0)
        gate.let.set()
        for task in (long, new):
            await rig.heard.finish(task.attempt)
            assert rig.heard.answers[task.attempt] == expected_for(task)
    assert [item.length for item in rig.runner.batches[1].items] == [1, 3]


async def test_a_device_with_a_queue_has_the_next_step_before_this_one_ends() -> None:
    launched = threading.Semaphore(0)
    rig = engine_rig.make_rig(before_step=lambda batch: launched.release(), device=QueueRunner)
    assert isinstance(rig.runner, QueueRunner)
    rig.runner.before_end = lambda batch: assert_launched(launched, batch)
    async with running(rig):
        task = engine_rig.make_task("x", max_tokens=5)
        rig.engine.submit(task)
        await rig.heard.finish(task.attempt)
        assert rig.heard.answers[task.attempt] == expected_for(task)


def assert_launched(launched: threading.Semaphore, batch: Batch) -> None:
    """Wait until the step behind this one has been launched; the fifth token's is the last."""
    assert launched.acquire(timeout=20)
    if batch.step == 1:
        assert launched.acquire(timeout=20)
    if batch.step == 4:
        launched.release()


async def test_tokens_after_a_stop_are_thrown_away() -> None:
    task = engine_rig.make_task("x", max_tokens=9)
    stop = expected_for(task)[3]
    for device in (engine_rig.FakeRunner, QueueRunner):
        async with running(engine_rig.make_rig(eos=(stop,), device=device)) as rig:
            rig.engine.submit(task)
            assert (await rig.heard.finish(task.attempt)).reason is FinishReason.STOP
            assert rig.heard.answers[task.attempt] == expected_for(task, (stop,))
            await rig.until_idle()
            assert len(rig.runner.batches) in (4, 5), "at most one step too many"


async def test_a_step_that_fails_on_the_device_spoils_the_one_behind_it() -> None:
    rig = engine_rig.make_rig(device=QueueRunner, max_batch_tokens=10)
    assert isinstance(rig.runner, QueueRunner)
    rig.runner.before_end = Faulty(RuntimeError("lost"), {1})
    bad, good = engine_rig.make_task("bad", 10), engine_rig.make_task("good", 4)
    async with running(rig):
        for task in (bad, good):  # the first fills a step, the second begins in the one behind
            rig.engine.submit(task)
        assert (await rig.heard.finish(bad.attempt)).reason is FinishReason.ERROR
        assert (await rig.heard.finish(good.attempt)).reason is FinishReason.LENGTH
    assert rig.heard.answers == {bad.attempt: [], good.attempt: expected_for(good)}


async def test_cancel_of_one_that_is_only_in_the_step_behind_is_at_once() -> None:
    gate = Gate()
    async with running(engine_rig.make_rig(max_num_seqs=1, before_step=gate)) as rig:
        rig.engine.submit(engine_rig.make_task("first", max_tokens=1))
        rig.engine.submit(engine_rig.make_task("second"))
        await gate.reached()
        rig.engine.cancel(AttemptId("second"))
        assert rig.heard.finishes[AttemptId("second")].reason is FinishReason.CANCELLED
        gate.let.set()
        await rig.heard.finish(AttemptId("first"))
        rig.assert_idle()
    assert len(rig.runner.batches) == 1
