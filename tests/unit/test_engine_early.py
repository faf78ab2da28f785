"""Sequences that begin while the KV before them is still arriving, layer group by layer group."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from baton.engine import gate
from baton.engine.events import KvWanted
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, FinishReason, GenerationTask
from tests.engine_rig import BLOCK, LAYERS, Faulty, Rig, covered, make_rig, make_task, running
from tests.fake_runner import FakeRunner, QueueRunner, expected_for

X, Y, Z = AttemptId("x"), AttemptId("y"), AttemptId("z")
TASK = make_task("x", prompt_len=14)
WANTED = 3  # of its blocks: the last one is never fetched
HALF = LAYERS // 2


@pytest.fixture(autouse=True)
def endless_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here ends because it was waited for long enough."""
    monkeypatch.setattr(gate, "PATIENCE_S", 1000.0)


def bring(rig: Rig, wanted: KvWanted, task: GenerationTask = TASK, wrong: bool = False) -> None:
    """What a transfer does to the engine's memory."""
    for index, block in enumerate(wanted.blocks, wanted.first_block):
        for slot in range(BLOCK):
            position = index * BLOCK + slot
            token = task.prompt[position] + wrong
            rig.runner.memory.write(block, slot, position, token)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def a_while() -> None:
    """Nothing that is wrong happens meanwhile."""
    for _ in range(200):
        await asyncio.sleep(0)


async def submit(rig: Rig, hand_off: bool = False) -> KvWanted:
    rig.engine.submit(TASK, hand_off, fetchable=WANTED)
    await rig.heard.until(lambda: X in rig.heard.wanted)
    return rig.heard.wanted[X]


async def begin(rig: Rig, hand_off: bool = False) -> KvWanted:
    """X is in a step that waits for its second half of layers."""
    wanted = await submit(rig, hand_off)
    rig.engine.layers_came(wanted.sequence, HALF)
    await until(lambda: rig.runner.passed == [HALF])
    return wanted


def starts(rig: Rig, sequence: int) -> list[int]:
    """Where the steps of a sequence began, those that did not count included."""
    items = [item for batch in rig.runner.batches for item in batch.items]
    return [item.start for item in items if item.sequence == sequence]


def findable(rig: Rig, wanted: KvWanted) -> int:
    keys = [wanted.keys[at : at + 16] for at in range(0, len(wanted.keys), 16)]
    blocks = rig.engine.loans.lend(keys)
    rig.engine.loans.end(blocks)
    return len(blocks)


@pytest.mark.parametrize("hand_off", [False, True])
async def test_a_step_waits_for_each_layer_group_and_counts_when_all_is_known_to_be_good(
    hand_off: bool,
) -> None:
    async with running(make_rig(layer_groups=2)) as rig:
        wanted = await begin(rig, hand_off)
        await a_while()
        assert rig.runner.passed == [HALF]
        bring(rig, wanted)
        rig.engine.layers_came(wanted.sequence, LAYERS)
        await until(lambda: rig.runner.passed == [HALF, LAYERS])
        await a_while()
        assert not rig.heard.answers
        assert not rig.heard.ready
        assert not rig.heard.filled
        assert findable(rig, wanted) == 0
        rig.engine.check_integrity()
        rig.engine.arrived(wanted.sequence, WANTED)
        if hand_off:
            await rig.heard.until(lambda: X in rig.heard.prefilled)
            assert rig.heard.prefilled[X][1:] == (4, WANTED * BLOCK)
            assert len(covered(rig.heard.ready[X])) == 4 * LAYERS
            finish = rig.engine.release(X)
        else:
            finish = await rig.heard.finish(X)
            assert starts(rig, wanted.sequence)[1] == 14  # a decode: nothing was computed twice
        assert finish is not None
        answer = expected_for(TASK)
        assert rig.heard.answers[X] == (answer[:1] if hand_off else answer)
        assert finish.cached_tokens == WANTED * BLOCK
        assert findable(rig, wanted) == WANTED
        spans = {span.name: span for span in finish.spans}
        assert spans["fetch"].start_s <= spans["prefill"].start_s < spans["fetch"].end_s


@pytest.mark.parametrize("device", [FakeRunner, QueueRunner])
@pytest.mark.parametrize("came", [0, 1, 2])
async def test_what_was_computed_on_kv_that_proved_bad_is_thrown_away(
    came: int, device: type[FakeRunner]
) -> None:
    """The loan expired, say, after the first token was sampled."""
    async with running(make_rig(layer_groups=2, device=device)) as rig:
        wanted = await submit(rig)
        bring(rig, wanted, wrong=True)
        rig.engine.layers_came(wanted.sequence, LAYERS)
        await until(lambda: LAYERS in rig.runner.passed)
        bring(rig, wanted)
        rig.engine.arrived(wanted.sequence, came)
        assert (await rig.heard.finish(X)).cached_tokens == came * BLOCK
        assert rig.heard.answers[X] == expected_for(TASK)


async def test_an_error_on_kv_that_proved_bad_is_nobodys_error() -> None:
    fault = Faulty(ValueError("not finite"), {1})
    async with running(make_rig(before_step=fault)) as rig:
        wanted = await submit(rig)
        rig.engine.layers_came(wanted.sequence, LAYERS)
        await until(lambda: fault.seen == 1)
        rig.engine.arrived(wanted.sequence, 0)
        await rig.heard.finish(X)
        assert rig.heard.answers[X] == expected_for(TASK)


async def test_an_error_on_good_kv_ends_the_sequence() -> None:
    fault = Faulty(ValueError("out of memory"), {1})
    async with running(make_rig(before_step=fault)) as rig:
        wanted = await submit(rig)
        rig.engine.layers_came(wanted.sequence, LAYERS)
        await until(lambda: fault.seen == 1)
        rig.engine.arrived(wanted.sequence, WANTED)
        finish = await rig.heard.finish(X)
        assert finish.error is not None
        assert "out of memory" in finish.error.message


@pytest.mark.parametrize("came", [1, WANTED])
async def test_a_layer_that_is_too_late_is_waited_for_without_a_step(
    came: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "PATIENCE_S", 0.001)
    async with running(make_rig(layer_groups=2)) as rig:
        wanted = await begin(rig)
        await until(lambda: rig.engine._scheduler.in_flight == ())
        rig.engine.layers_came(wanted.sequence, LAYERS)
        await a_while()
        assert len(rig.runner.batches) == 1  # it does not try again
        bring(rig, wanted)
        rig.engine.arrived(wanted.sequence, came)
        assert (await rig.heard.finish(X)).cached_tokens == came * BLOCK
        assert rig.heard.answers[X] == expected_for(TASK)


async def test_nobody_waits_behind_layers_that_have_not_come() -> None:
    async with running(make_rig(layer_groups=2)) as rig:
        wanted = await begin(rig)
        other = make_task("y")
        rig.engine.submit(other)
        await rig.heard.finish(Y)
        assert rig.heard.answers[Y] == expected_for(other)
        assert X not in rig.heard.answers
        bring(rig, wanted)
        rig.engine.arrived(wanted.sequence, WANTED)
        await rig.heard.finish(X)
        assert rig.heard.answers[X] == expected_for(TASK)


async def test_a_step_with_something_else_to_do_does_not_begin_early() -> None:
    async with running(make_rig(layer_groups=2)) as rig:
        rig.engine.submit(make_task("y", max_tokens=50))
        wanted = await submit(rig)
        rig.engine.layers_came(wanted.sequence, HALF)
        await rig.heard.until(lambda: len(rig.heard.answers.get(Y, ())) >= 10)
        assert not rig.runner.passed
        bring(rig, wanted)
        rig.engine.arrived(wanted.sequence, WANTED)
        await rig.heard.finish(X)
        assert not rig.runner.passed
        assert rig.heard.answers[X] == expected_for(TASK)


async def test_nobody_shares_what_is_computed_early_before_it_counts() -> None:
    """Z could find Y's blocks, which are filled in its own step, and behind them one of X."""
    async with running(make_rig(layer_groups=2, num_blocks=40)) as rig:
        prompt = tuple(range(18))
        task = GenerationTask(X, prompt, TASK.sampling)
        rig.engine.submit(task, fetchable=WANTED)
        await rig.heard.until(lambda: X in rig.heard.wanted)
        wanted = rig.heard.wanted[X]
        bring(rig, wanted, task, wrong=True)
        rig.engine.layers_came(wanted.sequence, LAYERS)
        await until(lambda: rig.runner.passed == [HALF, LAYERS])
        tasks = [GenerationTask(Y, prompt[:13], TASK.sampling), replace(task, attempt=Z)]
        for other in tasks:
            rig.engine.submit(other)
        await a_while()
        rig.engine.arrived(wanted.sequence, 0)
        for one in (task, *tasks):
            await rig.heard.finish(one.attempt)
            assert rig.heard.answers[one.attempt] == expected_for(one)
        assert starts(rig, wanted.sequence + 2)[0] <= WANTED * BLOCK


def test_a_step_that_has_given_up_does_not_count_whatever_comes() -> None:
    closed = gate.Gate()
    closed.open(LAYERS)
    closed.close()
    assert not closed.settle(True)
    assert not closed.settled()
    with pytest.raises(gate.GateClosed):
        closed.wait(1)
    assert not closed.ready


@pytest.mark.parametrize("came", ["nothing", "half", "all"])
@pytest.mark.parametrize("hand_off", [False, True])
async def test_a_cancel_ends_the_step_and_keeps_the_blocks_until_the_transfer_ends(
    came: str, hand_off: bool
) -> None:
    async with running(make_rig(layer_groups=2)) as rig:
        wanted = await begin(rig, hand_off)
        if came == "all":
            bring(rig, wanted)
            rig.engine.layers_came(wanted.sequence, LAYERS)
            await until(lambda: rig.runner.passed == [HALF, LAYERS])
        rig.engine.cancel(X)
        if came == "half":
            rig.engine.arrived(wanted.sequence, 1)
        assert (await rig.heard.finish(X)).reason is FinishReason.CANCELLED
        rig.engine.check_integrity()
        if came != "half":
            assert rig.in_state(BlockState.QUARANTINED) == WANTED
            rig.engine.arrived(wanted.sequence, WANTED)
        assert rig.in_state(BlockState.FREE) == rig.pool.num_blocks
        assert not rig.heard.answers.get(X)


async def test_an_engine_that_stops_does_not_wait_for_layers() -> None:
    rig = make_rig(layer_groups=2)
    rig.task = asyncio.create_task(rig.engine.run())
    wanted = await begin(rig)
    rig.task.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait([rig.task])
    assert rig.heard.finishes[X].reason is FinishReason.CANCELLED
    rig.engine.arrived(wanted.sequence, 0)
    rig.assert_idle()


async def test_one_that_begins_early_behind_a_step_runs_in_it_if_all_has_come_by_then() -> None:
    """It is taken back, and scheduled like any other."""
    ahead = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with running(make_rig(layer_groups=2)) as rig:
        first: list[int] = []

        def hold(batch: object) -> None:
            if not first:
                first.append(1)
                asyncio.run_coroutine_threadsafe(ahead.wait(), loop).result(20)

        rig.runner.before_step = hold
        rig.engine.submit(make_task("y", max_tokens=1))
        await until(lambda: bool(first))
        wanted = await submit(rig)
        rig.engine.layers_came(wanted.sequence, HALF)
        await a_while()
        bring(rig, wanted)
        rig.engine.arrived(wanted.sequence, WANTED)
        ahead.set()
        await rig.heard.finish(X)
        assert not rig.runner.passed
        assert rig.heard.answers[X] == expected_for(TASK)
