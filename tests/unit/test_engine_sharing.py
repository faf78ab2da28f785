"""Prompts that share a prefix and arrive together: it is computed once, and read in the same step
or the next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.engine.batch import Batch
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Ending, Sequence
from baton.errors import InternalError
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, FinishReason, GenerationTask
from tests import engine_rig
from tests.engine_rig import Faulty, Gate, covered, running
from tests.fake_runner import QueueRunner, expected_answer, expected_for
from tests.scheduler_rig import CANCELLED, Rig, make_rig, make_task, shape

FAILED = Ending(FinishReason.ERROR)


def task_of(number: int, own: int = 3, shared: int = 8, **values: int | str) -> GenerationTask:
    """`shared` tokens that all numbers have, then `own` that no other has."""
    task = make_task(shared, name=str(number))
    prompt = (*task.prompt, *range(100 * number, 100 * number + own))
    return replace(task, prompt=prompt, **values)


def schedule(rig: Rig) -> Batch:
    batch = rig.scheduler.schedule(0.0)
    assert batch is not None
    rig.scheduler.check_integrity()
    return batch


def assert_answered(rig: Rig, *sequences: Sequence) -> None:
    for sequence in sequences:
        task = sequence.task
        expected = expected_answer(task.prompt, task.sampling, output=task.output)
        assert rig.answers[sequence.number] == expected


# -- who starts where -----------------------------------------------------------------------


def test_prompts_of_one_step_compute_their_prefix_once() -> None:
    rig = make_rig(max_batch_tokens=20)
    sequences = [rig.submit(task_of(number)) for number in range(1, 5)]
    assert shape(rig.step()) == [(1, 0, 11), (2, 8, 3), (3, 8, 3), (4, 8, 3)]
    assert len({sequence.blocks[:2] for sequence in sequences}) == 1
    assert [sequence.cached_tokens for sequence in sequences] == [0, 8, 8, 8]
    assert dict(rig.pool.counts())[BlockState.ACTIVE] == 2 + 4
    rig.drain()
    assert_answered(rig, *sequences)


def test_a_prefix_is_shared_while_the_step_that_computes_it_is_in_flight() -> None:
    rig = make_rig()
    one = rig.submit(task_of(1))
    first = schedule(rig)
    two = rig.submit(task_of(2))
    second = schedule(rig)
    assert shape(second) == [(1, 11, 1), (2, 8, 3)]
    assert (two.computed, two.cached_tokens) == (0, 8)
    rig.commit(first)
    rig.commit(second)
    assert two.computed == 11
    rig.drain()
    assert_answered(rig, one, two)


def test_the_last_token_is_computed_all_the_same() -> None:
    rig = make_rig(max_batch_tokens=20)
    twins = [rig.submit(task_of(1, own=0)), rig.submit(task_of(1, own=0))]
    assert shape(rig.step()) == [(1, 0, 8), (2, 4, 4)]
    rig.drain()
    assert_answered(rig, *twins)


def test_who_would_repeat_the_rest_of_a_prompt_waits_for_it() -> None:
    rig = make_rig(max_batch_tokens=10)
    sequences = [rig.submit(task_of(number, shared=20)) for number in (1, 2)]
    assert shape(rig.step()) == [(1, 0, 8)], "2 tokens are left, of a block that comes next"
    assert shape(rig.step()) == [(1, 8, 8)]
    assert shape(rig.step()) == [(1, 16, 7), (2, 20, 3)]
    assert sequences[1].cached_tokens == 20
    rig.drain()
    assert_answered(rig, *sequences)


def test_a_shorter_prefix_is_no_reason_to_wait() -> None:
    rig = make_rig(max_batch_tokens=10)
    rig.submit(task_of(1, shared=16))
    rig.submit(task_of(2, shared=8))
    assert shape(rig.step()) == [(1, 0, 8), (2, 8, 2)]
    rig.drain()


def test_more_urgent_ones_share_what_less_urgent_ones_compute() -> None:
    rig = make_rig(max_batch_tokens=10)
    running = rig.submit(task_of(1, shared=20, priority=5))
    rig.step()
    urgent = rig.submit(task_of(2, shared=20, priority=0))
    other = rig.submit(task_of(3, shared=0, priority=3))
    assert shape(rig.step()) == [(1, 8, 8)], "nobody comes between"
    assert shape(rig.step()) == [(1, 16, 7), (2, 20, 3)]
    rig.drain()
    assert_answered(rig, running, urgent, other)


@pytest.mark.parametrize("hand_off", [False, True])
def test_another_salt_shares_nothing_and_the_cache_can_be_off(hand_off: bool) -> None:
    rig = make_rig(max_batch_tokens=40)
    rig.submit(task_of(1), hand_off)
    rig.submit(task_of(2, cache_salt="tenant"), hand_off)
    assert shape(rig.schedule()) == [(1, 0, 11), (2, 0, 11)]
    rig = make_rig(max_batch_tokens=14, prefix_caching=False)
    sequences = [rig.submit(task_of(number), hand_off) for number in (1, 2)]
    assert shape(rig.schedule()) == [(1, 0, 11), (2, 0, 3)]
    assert [sequence.cached_tokens for sequence in sequences] == [0, 0]


def test_keys_that_a_step_promises_are_accounted_for() -> None:
    rig = make_rig()
    sequence = rig.submit(task_of(1))
    rig.step()
    rig.scheduler._cache.expect(sequence, 0, 4)
    with pytest.raises(InternalError, match="expected"):
        rig.scheduler.check_integrity()


def test_what_is_computed_ends_with_the_first_block_that_is_not() -> None:
    """A key may be known while the one before it is computed anew: its owner had a twin's block."""
    rig = make_rig(num_blocks=6)
    one, two = rig.sequence(task_of(1)), rig.sequence(task_of(2))
    one.blocks = rig.pool.allocate(2) or ()
    cache = PrefixCache(rig.pool, rig.config.layout, enabled=True)
    keys = cache.expect(one, 0, 4)
    second = cache.key_at(one, 4)
    assert second is not None
    rig.pool.register(one.blocks[1], second)
    assert cache.match(two) == (one.blocks, 0, None)
    cache.forget(keys)
    assert cache.match(two) == ((), 0, *keys)


# -- steps that do not count ----------------------------------------------------------------


def test_when_the_step_fails_those_behind_it_compute_the_prefix_themselves() -> None:
    rig = make_rig()
    rig.submit(task_of(1))
    first = schedule(rig)
    two, three = rig.submit(task_of(2)), rig.submit(task_of(3))
    second = schedule(rig)
    assert shape(second)[1:] == [(2, 8, 3), (3, 8, 3)]
    rig.record(rig.scheduler.discard(first, FAILED))
    rig.record(rig.scheduler.withdraw(second))
    assert rig.endings == {1: FAILED}
    rig.scheduler.check_integrity()
    assert dict(rig.pool.counts())[BlockState.FREE] == rig.pool.num_blocks
    load = rig.scheduler.load()
    assert (load.running, load.waiting, load.waiting_tokens) == (0, 2, 11 + 11)
    assert shape(rig.step()) == [(2, 0, 11), (3, 8, 3)]
    assert (two.cached_tokens, three.cached_tokens) == (0, 8)
    rig.drain()
    assert_answered(rig, two, three)
    assert (two.preemptions, three.preemptions) == (0, 0)


def test_a_step_that_is_taken_back_sends_back_those_who_share() -> None:
    rig = make_rig()
    one = rig.submit(task_of(1))
    first = schedule(rig)
    two = rig.submit(task_of(2))
    second = schedule(rig)
    assert rig.scheduler.withdraw(second) == ()
    assert (two.blocks, two.started_at) == ((), None)
    third = schedule(rig)
    assert shape(third) == shape(second)
    rig.commit(first)
    rig.commit(third)
    rig.drain()
    assert_answered(rig, one, two)


def test_one_who_had_started_before_the_step_stays() -> None:
    rig = make_rig(max_batch_tokens=14)
    one, two = rig.submit(task_of(1)), rig.submit(task_of(2, own=9))
    first = schedule(rig)
    assert shape(first) == [(1, 0, 11), (2, 8, 3)]
    second = schedule(rig)
    assert shape(second) == [(1, 11, 1), (2, 11, 6)]
    rig.scheduler.withdraw(second)
    assert (two.computed, two.planned) == (0, 11)
    rig.commit(first)
    rig.drain()
    assert_answered(rig, one, two)


def test_who_shared_with_one_that_is_cancelled_keeps_its_blocks() -> None:
    rig = make_rig()
    one = rig.submit(task_of(1))
    first = schedule(rig)
    two = rig.submit(task_of(2))
    second = schedule(rig)
    rig.cancel(one)
    rig.commit(first)
    rig.commit(second)
    assert rig.endings[1] == CANCELLED
    rig.drain()
    assert_answered(rig, two)


def test_cancelled_before_the_step_that_it_was_to_share_in() -> None:
    rig = make_rig(max_num_seqs=3, max_batch_tokens=20)
    rig.submit(make_task(4, start=500))
    first = schedule(rig)
    two, three = rig.submit(task_of(2)), rig.submit(task_of(3))
    second = schedule(rig)
    assert shape(second)[1:] == [(2, 0, 11), (3, 8, 3)]
    rig.cancel(three)
    rig.record(rig.scheduler.withdraw(second))
    rig.cancel(two)
    assert rig.endings == {two.number: CANCELLED, three.number: CANCELLED}
    rig.commit(first)
    rig.drain()


def test_a_victim_that_is_sent_back_keeps_its_first_start() -> None:
    rig = make_rig(num_blocks=6)
    rig.submit(make_task(8, 16))
    victim = rig.submit(make_task(4, 16, 100))
    while not victim.preemptions:
        rig.step()
    while not victim.blocks:
        flying = schedule(rig)
        behind = rig.scheduler.schedule(0.0)
        if behind is not None:
            rig.record(rig.scheduler.withdraw(behind))
        rig.commit(flying)
    assert victim.started_at is not None
    assert victim.cached_tokens == 0
    rig.drain()


# -- with the loop --------------------------------------------------------------------------


def alike(name: str, own: int = 3) -> GenerationTask:
    """Tasks with the same 8 leading tokens."""
    task = engine_rig.make_task(name, own)
    return replace(task, prompt=(*range(8), *task.prompt))


@pytest.mark.parametrize("device", [engine_rig.FakeRunner, QueueRunner])
async def test_eight_that_arrive_together(device: type[engine_rig.FakeRunner]) -> None:
    tasks = [alike(name) for name in "abcdefgh"]
    async with running(engine_rig.make_rig(device=device)) as rig:
        for task in tasks:
            rig.engine.submit(task)
        for task in tasks:
            finish = await rig.heard.finish(task.attempt)
            assert finish.cached_tokens == (0 if task is tasks[0] else 8)
            assert rig.heard.answers[task.attempt] == expected_for(task)
        computed = sum(batch.num_tokens for batch in rig.runner.batches)
    assert computed == 8 + 8 * (3 + 5)


async def test_a_failed_step_does_not_spoil_those_who_wanted_to_share() -> None:
    rig = engine_rig.make_rig(device=QueueRunner, max_batch_tokens=8)
    assert isinstance(rig.runner, QueueRunner)
    rig.runner.before_end = Faulty(RuntimeError("lost"), {1})
    bad, good = alike("bad", 0), alike("good")
    async with running(rig):
        rig.engine.submit(bad)
        rig.engine.submit(good)
        assert (await rig.heard.finish(bad.attempt)).reason is FinishReason.ERROR
        assert (await rig.heard.finish(good.attempt)).cached_tokens == 0
    assert rig.heard.answers[good.attempt] == expected_for(good)


@pytest.mark.parametrize("layer_groups", [1, 2])
async def test_what_is_shared_is_published_when_it_is_computed(layer_groups: int) -> None:
    """Both of a step publish the shared blocks; the second must not do so before the step."""
    gate = Gate()
    one, two = alike("one"), alike("two")
    early: list[AttemptId] = []
    async with running(engine_rig.make_rig(layer_groups=layer_groups)) as rig:
        rig.engine.submit(engine_rig.make_task("warm"))
        await rig.heard.finish(AttemptId("warm"))
        rig.heard.on_ready = lambda ready: early.append(ready.attempt)
        rig.runner.before_step = gate
        for task in (one, two):
            rig.engine.submit(task, hand_off=True)
        await gate.reached()
        assert early == []
        gate.let.set()
        for task in (one, two):
            await rig.heard.until(lambda task=task: task.attempt in rig.heard.prefilled)  # type: ignore[misc]
            assert len(covered(rig.heard.ready[task.attempt])) == 3 * engine_rig.LAYERS
            first, _, _ = rig.heard.prefilled[task.attempt]
            assert first.token_id == expected_for(task)[0]
        assert rig.heard.prefilled[two.attempt][2] == 8
        assert [item.start for item in rig.runner.batches[-1].items] == [0, 8]
        for task in (one, two):
            rig.engine.release(task.attempt)
