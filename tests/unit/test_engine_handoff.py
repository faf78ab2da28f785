"""KV that leaves an engine or comes into it: publication, release, reservation, admission."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from baton.engine.events import KvReady
from baton.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    StaleAttempt,
)
from baton.types.fleet import BlockState
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    FinishReason,
    GenerationTask,
    SampledToken,
)
from tests.engine_rig import BLOCK, LAYERS, Faulty, Gate, Rig, covered, make_rig, make_task, running
from tests.fake_runner import VOCAB, FakeRunner, QueueRunner, expected_for, fake_layout

X = AttemptId("x")


async def prefill(rig: Rig, task: GenerationTask) -> SampledToken:
    rig.engine.submit(task, hand_off=True)
    await rig.heard.until(lambda: task.attempt in rig.heard.prefilled)
    return rig.heard.prefilled[task.attempt][0]


# -- out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 4, 11, 30])
@pytest.mark.parametrize("device", [FakeRunner, QueueRunner])
async def test_every_block_and_layer_is_published_once(
    groups: int, length: int, device: type[FakeRunner]
) -> None:
    rig = make_rig(layer_groups=groups, max_batch_tokens=10, device=device)
    async with running(rig):
        task = make_task("x", length)
        first = await prefill(rig, task)
        assert first.token_id == expected_for(task)[0]
        blocks = -(-length // BLOCK)
        cells = covered(rig.heard.ready[X])
        assert set(cells) == {(b, layer) for b in range(blocks) for layer in range(LAYERS)}
        assert rig.heard.prefilled[X] == (first, blocks, 0)
        assert [name for name, _ in rig.heard.events][-2:] == ["output", "prefilled"]
        assert rig.heard.answers[X] == [first.token_id]
        assert rig.in_state(BlockState.LEASED) == blocks
        assert rig.in_state(BlockState.ACTIVE) == 0
        finish = rig.engine.release(X)
        assert finish is not None
        assert finish.reason is FinishReason.HANDED_OFF
        assert finish.spans[-1].name == "handoff"
        assert X not in rig.heard.finishes, "the worker reports it"
        assert rig.engine.release(X) is None


async def test_layer_groups_are_published_while_the_step_runs() -> None:
    go = threading.Semaphore(0)
    async with running(make_rig(layer_groups=2)) as rig:
        rig.runner.after_layers = lambda layer_end: assert_acquired(go)
        rig.engine.submit(make_task("x", 6), hand_off=True)
        await rig.heard.until(lambda: X in rig.heard.ready)
        (half,) = rig.heard.ready[X]
        assert (half.first_block, len(half.blocks)) == (0, 2)
        assert (half.layer_begin, half.layer_end) == (0, 2)
        assert X not in rig.heard.prefilled
        assert rig.in_state(BlockState.LEASED) == 2
        go.release(2)
        await rig.heard.until(lambda: X in rig.heard.prefilled)
        assert (rig.heard.ready[X][1].layer_begin, rig.heard.ready[X][1].layer_end) == (2, 4)
        rig.engine.release(X)


async def test_a_chunk_with_little_kv_is_published_in_one_piece() -> None:
    rig = make_rig(layer_groups=2, by_layers_bytes=2 * fake_layout(BLOCK, LAYERS).block_bytes)
    async with running(rig):
        await prefill(rig, make_task("x", 2 * BLOCK - 1))
        (whole,) = rig.heard.ready[X]
        assert (whole.layer_begin, whole.layer_end) == (0, LAYERS)
        rig.engine.release(X)
        long = make_task("y", 2 * BLOCK)
        await prefill(rig, long)
        ready = rig.heard.ready[long.attempt]
        assert [(kv.layer_begin, kv.layer_end) for kv in ready] == [(0, 2), (2, LAYERS)]
        rig.engine.release(long.attempt)


async def test_short_and_long_chunks_of_one_step_are_both_published_whole() -> None:
    rig = make_rig(layer_groups=2, by_layers_bytes=2 * fake_layout(BLOCK, LAYERS).block_bytes)
    y = make_task("y", 3 * BLOCK)
    async with running(rig):
        rig.engine.submit(make_task("x", 3), hand_off=True)
        rig.engine.submit(y, hand_off=True)
        await rig.heard.until(lambda: {X, y.attempt} <= rig.heard.prefilled.keys())
        assert len(rig.heard.ready[X]) == 1
        assert len(rig.heard.ready[y.attempt]) == 2
        for task_blocks, attempt in ((1, X), (3, y.attempt)):
            cells = covered(rig.heard.ready[attempt])
            assert set(cells) == {(b, k) for b in range(task_blocks) for k in range(LAYERS)}
        for attempt in tuple(rig.heard.prefilled):
            rig.engine.release(attempt)


def assert_acquired(semaphore: threading.Semaphore) -> None:
    assert semaphore.acquire(timeout=20)


async def test_a_cached_prefix_is_published_before_the_rest_is_computed() -> None:
    gate = Gate()
    async with running(make_rig()) as rig:
        await prefill(rig, make_task("x", 11))
        rig.engine.release(X)
        rig.runner.before_step = gate
        again = AttemptId("x", 1)
        rig.engine.submit(replace(make_task("x", 11), attempt=again), hand_off=True)
        await gate.reached()
        (hit,) = rig.heard.ready[again]
        assert (hit.first_block, len(hit.blocks)) == (0, 2)
        assert (hit.layer_begin, hit.layer_end) == (0, LAYERS)
        gate.let.set()
        await rig.heard.until(lambda: again in rig.heard.prefilled)
        assert rig.heard.prefilled[again][1:] == (3, 8)
        assert len(covered(rig.heard.ready[again])) == 3 * LAYERS
        rig.engine.release(again)


async def test_an_answer_that_ends_with_its_first_token_is_not_handed_off() -> None:
    async with running(make_rig(layer_groups=2)) as rig:
        task = make_task("x", 11, max_tokens=1)
        rig.engine.submit(task, hand_off=True)
        assert (await rig.heard.finish(X)).reason is FinishReason.LENGTH
        assert rig.heard.answers[X] == expected_for(task)
        assert not rig.heard.prefilled
        rig.assert_idle()


async def test_cancel_of_a_hand_off_in_every_state() -> None:
    gate = Gate()
    async with running(make_rig(layer_groups=2, max_num_seqs=1)) as rig:
        await prefill(rig, make_task("leased", 11))
        rig.runner.before_step = gate
        rig.engine.submit(make_task("executing", 11), hand_off=True)
        rig.engine.submit(make_task("waiting", 11), hand_off=True)
        await gate.reached()
        for name in ("leased", "waiting", "executing"):
            rig.engine.cancel(AttemptId(name))
        assert rig.in_state(BlockState.LEASED) == 0
        gate.let.set()
        await rig.heard.finish(AttemptId("executing"))
        assert {f.reason for f in rig.heard.finishes.values()} == {FinishReason.CANCELLED}
        assert AttemptId("executing") not in rig.heard.ready, "cancelled before it was published"
        rig.assert_idle()


async def test_release_before_the_end_of_the_prefill_is_a_cancel() -> None:
    gate = Gate()
    async with running(make_rig(before_step=gate)) as rig:
        rig.engine.submit(make_task("x"), hand_off=True)
        await gate.reached()
        assert rig.engine.release(X) is None
        gate.let.set()
        assert (await rig.heard.finish(X)).reason is FinishReason.CANCELLED


async def test_a_listener_that_cancels_at_the_first_token_hears_of_no_prefill() -> None:
    async with running(make_rig()) as rig:
        rig.heard.on_output = lambda output: rig.engine.cancel(X)
        rig.engine.submit(make_task("x"), hand_off=True)
        assert (await rig.heard.finish(X)).reason is FinishReason.CANCELLED
        assert not rig.heard.prefilled


async def test_a_failed_step_ends_published_work() -> None:
    async with running(make_rig(max_batch_tokens=8, before_step=Faulty(OSError(), {2}))) as rig:
        rig.engine.submit(make_task("x", 20), hand_off=True)
        assert (await rig.heard.finish(X)).reason is FinishReason.ERROR
        assert rig.heard.ready[X]
        await rig.until_idle()


async def test_stopping_ends_leases_and_reservations() -> None:
    async with running(make_rig(num_blocks=8, max_num_seqs=1)) as rig:
        await prefill(rig, make_task("x", 11))
        await rig.engine.reserve(AttemptId("granted"), 4, 5)
        waiting = asyncio.create_task(rig.engine.reserve(AttemptId("waiting"), 4, 5))
        await asyncio.sleep(0)
        rig.engine.stop()
        with pytest.raises(Cancelled):
            await waiting
        assert rig.task is not None
        await rig.task
        assert len(rig.heard.finishes) == 3
        assert rig.in_state(BlockState.QUARANTINED) == 1
        rig.engine.unreserve(AttemptId("granted"))


# -- in -------------------------------------------------------------------------------------


async def test_split_gives_the_same_tokens_as_one_engine() -> None:
    tasks = [make_task(f"t{i}", 1 + 5 * i, 3 + 2 * i, seed=i) for i in range(8)]
    source = make_rig(num_blocks=40, layer_groups=2, max_batch_tokens=12)
    target = make_rig(num_blocks=26)  # too small for all at once: preemption after admission

    async def serve(task: GenerationTask) -> None:
        source.engine.submit(task, hand_off=True)
        blocks, _ = await target.engine.reserve(task.attempt, len(task.prompt), 20)
        await source.heard.until(lambda: task.attempt in source.heard.prefilled)
        first, _, cached = source.heard.prefilled[task.attempt]
        cells = covered(source.heard.ready[task.attempt])
        theirs = [cells[index, 0] for index in range(len(blocks))]
        target.runner.memory.copy_from(source.runner.memory, theirs, blocks)
        source.engine.release(task.attempt)
        target.engine.admit(task, blocks, first, cached)
        finish = await target.heard.finish(task.attempt)
        assert finish.reason is FinishReason.LENGTH

    async with running(source), running(target):
        await asyncio.gather(*(serve(task) for task in tasks))
    for task in tasks:
        first = source.heard.answers[task.attempt]
        assert first + target.heard.answers[task.attempt] == expected_for(task)


async def admitted(rig: Rig, task: GenerationTask) -> tuple[int, ...]:
    """Reserve, and 'transfer' the KV of the prompt by writing it."""
    context = (*task.prompt, *task.output)
    blocks, _ = await rig.engine.reserve(task.attempt, len(context), 5)
    for position, token in enumerate(context):
        rig.runner.memory.write(blocks[position // BLOCK], position % BLOCK, position, token)
    return blocks


async def test_admitted_kv_is_found_again_by_its_prefix() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", 10)
        blocks = await admitted(rig, task)
        rig.engine.admit(task, blocks, SampledToken(expected_for(task)[0], 0), cached_tokens=3)
        assert (await rig.heard.finish(X)).cached_tokens == 3
        assert rig.heard.answers[X] == expected_for(task)[1:]
        again = replace(task, attempt=AttemptId("x", 1))
        rig.engine.submit(again)
        assert (await rig.heard.finish(again.attempt)).cached_tokens == 8
        assert rig.heard.answers[again.attempt] == expected_for(task)


async def test_an_admitted_answer_that_is_complete_ends_at_once() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", 10, max_tokens=1)
        rig.engine.admit(task, await admitted(rig, task), SampledToken(1, 0))
        assert rig.heard.finishes[X].reason is FinishReason.LENGTH
        assert rig.heard.answers[X] == []
        rig.assert_idle()


async def test_a_resumed_attempt_is_admitted_at_its_place() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", 7, max_tokens=8)
        answer = expected_for(task)
        task = replace(task, output=tuple(answer[:3]))
        rig.engine.admit(task, await admitted(rig, task), SampledToken(answer[3], 3))
        await rig.heard.finish(X)
        assert rig.heard.answers[X] == answer[4:]


async def test_only_the_reserved_blocks_are_admitted() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", 10)
        first = SampledToken(1, 0)
        with pytest.raises(StaleAttempt):
            rig.engine.admit(task, (0, 1, 2), first)
        blocks = await admitted(rig, task)
        for other_task, other_blocks, other_first in (
            (task, blocks[:2], first),
            (make_task("x", 13), blocks, first),
            (task, blocks, SampledToken(1, 1)),
        ):
            with pytest.raises(InternalError, match="not its own"):
                rig.engine.admit(other_task, other_blocks, other_first)
        rig.engine.quarantine(X)
        with pytest.raises(StaleAttempt):
            rig.engine.admit(task, blocks, first)
        rig.engine.end_quarantine(X)


async def test_a_first_token_that_no_model_has_is_not_admitted() -> None:
    async with running(make_rig(vocab_size=VOCAB)) as rig:
        task = make_task("x", 10)
        blocks = await admitted(rig, task)
        with pytest.raises(InternalError, match=f"token {VOCAB}"):
            rig.engine.admit(task, blocks, SampledToken(VOCAB, 0))
        rig.engine.unreserve(X)
        with pytest.raises(InvalidRequest, match=f"{VOCAB} is out of range"):
            await rig.engine.reserve(X, 11, 5, task=replace(task, output=(VOCAB,)))


async def test_reservations_wait_for_blocks_in_order() -> None:
    async with running(make_rig(num_blocks=4)) as rig:
        await rig.engine.reserve(X, 16, 5)
        order: list[str] = []

        async def reserve(name: str) -> None:
            await rig.engine.reserve(AttemptId(name), 13, 5)
            order.append(name)
            rig.engine.unreserve(AttemptId(name))

        async with asyncio.TaskGroup() as group:
            for name in "abc":
                group.create_task(reserve(name))
            await asyncio.sleep(0)
            assert rig.engine.load().waiting == 3
            rig.engine.unreserve(X)
            rig.engine.unreserve(X)
        assert order == ["a", "b", "c"]


async def test_a_reservation_that_cannot_be_had() -> None:
    async with running(make_rig(num_blocks=4, max_waiting=1)) as rig:
        with pytest.raises(InvalidRequest):
            await rig.engine.reserve(X, 17, 5)
        await rig.engine.reserve(X, 16, 5)
        with pytest.raises(StaleAttempt):
            await rig.engine.reserve(X, 1, 5)
        with pytest.raises(DeadlineExceeded):
            await rig.engine.reserve(AttemptId("late"), 1, 0.01)
        rig.engine.submit(make_task("waiting"))
        with pytest.raises(Overloaded):
            await rig.engine.reserve(AttemptId("many"), 1, 5)
        rig.engine.unreserve(X)
        await rig.heard.finish(AttemptId("waiting"))
        assert set(rig.heard.finishes) == {AttemptId("waiting")}


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_waiter_gives_its_blocks_back(granted: bool) -> None:
    """Even when they were granted in the very moment of the cancellation."""
    async with running(make_rig(num_blocks=4)) as rig:
        await rig.engine.reserve(X, 16, 5)
        waiter = asyncio.create_task(rig.engine.reserve(AttemptId("y"), 4, 5))
        await asyncio.sleep(0)
        if granted:
            rig.engine.unreserve(X)
        waiter.cancel()
        if not granted:
            rig.engine.unreserve(X)
        with pytest.raises(asyncio.CancelledError):
            await waiter
        rig.assert_idle()


async def test_cancel_of_a_reservation() -> None:
    y = AttemptId("y")
    async with running(make_rig(num_blocks=4)) as rig:
        blocks, _ = await rig.engine.reserve(X, 16, 5)
        waiter = asyncio.create_task(rig.engine.reserve(y, 4, 5))
        await asyncio.sleep(0)
        rig.engine.cancel(y)
        with pytest.raises(Cancelled):
            await waiter
        rig.engine.cancel(X)
        rig.engine.cancel(X)
        assert rig.in_state(BlockState.QUARANTINED) == 4, "a transfer may be writing"
        with pytest.raises(StaleAttempt):
            rig.engine.admit(make_task("x", 16), blocks, SampledToken(1, 0))
        assert set(rig.heard.finishes) == {X, y}
        rig.engine.unreserve(X)
        rig.assert_idle()


async def test_quarantine_ends_only_by_the_transports_word() -> None:
    async with running(make_rig(num_blocks=4)) as rig:
        await rig.engine.reserve(X, 9, 5)
        rig.engine.quarantine(X)
        rig.engine.unreserve(X)
        rig.engine.cancel(X)
        assert rig.in_state(BlockState.QUARANTINED) == 3
        waiter = asyncio.create_task(rig.engine.reserve(AttemptId("y"), 8, 5))
        await asyncio.sleep(0)
        assert not waiter.done()
        rig.engine.end_quarantine(X)
        rig.engine.end_quarantine(X)
        rig.engine.quarantine(X)
        await waiter
        rig.engine.unreserve(AttemptId("y"))
        assert X not in rig.heard.finishes


async def test_reserved_blocks_outlive_the_engine_until_they_are_idle() -> None:
    async with running(make_rig()) as rig:
        await rig.engine.reserve(X, 9, 5)
        rig.engine.quarantine(X)
        rig.engine.stop()
        assert rig.task is not None
        await rig.task
        assert rig.in_state(BlockState.QUARANTINED) == 3
        rig.engine.end_quarantine(X)


async def test_a_listener_that_fails_ends_the_engine_but_leaks_nothing() -> None:
    rig = make_rig()

    def fail(output: AttemptOutput) -> None:
        rig.heard.on_output = lambda output: None
        raise RuntimeError("a bug in the worker")

    rig.heard.on_output = fail
    for name in ("x", "y"):
        rig.engine.submit(make_task(name))
    with pytest.raises(RuntimeError):
        await rig.engine.run()
    assert {f.reason for f in rig.heard.finishes.values()} == {FinishReason.ERROR}
    rig.assert_idle()


async def test_a_listener_that_fails_between_a_step_and_its_commit_leaks_nothing() -> None:
    rig = make_rig()

    def fail(ready: KvReady) -> None:
        rig.heard.on_ready = lambda ready: None
        raise RuntimeError("a bug in the worker")

    rig.heard.on_ready = fail
    for name in ("x", "y"):
        rig.engine.submit(make_task(name), hand_off=True)
    with pytest.raises(RuntimeError):
        await rig.engine.run()
    assert {f.reason for f in rig.heard.finishes.values()} == {FinishReason.ERROR}
    rig.assert_idle()
