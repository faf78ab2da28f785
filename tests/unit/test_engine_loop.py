"""The engine's loop on a fake runner: answers, endings, cancellation, failures, shutdown."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from dataclasses import replace

import pytest

from baton.engine.batch import Batch, BatchResult, Computed, Launched, LayerCallback, LayerGate
from baton.engine.block_pool import BlockPool
from baton.engine.loop import Engine
from baton.engine.stepper import MAX_FAILURES
from baton.errors import InternalError, InvalidRequest, Overloaded, StaleAttempt, TransportError
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, AttemptOutput, FinishReason, SampledToken
from tests.engine_rig import Faulty, Gate, Rig, make_rig, make_task, running
from tests.fake_runner import FakeRunner, expected_for

# -- answers --------------------------------------------------------------------------------


async def test_answers_many_at_once() -> None:
    tasks = [make_task(f"t{i}", 1 + 7 * i % 40, 1 + i, seed=i) for i in range(12)]
    async with running(make_rig(num_blocks=64, max_batch_tokens=16)) as rig:
        for task in tasks:
            rig.engine.submit(task)
        for task in tasks:
            finish = await rig.heard.finish(task.attempt)
            assert finish.reason is FinishReason.LENGTH
            assert rig.heard.answers[task.attempt] == expected_for(task)


async def test_work_may_come_before_the_loop_runs() -> None:
    rig = make_rig()
    task = make_task("early")
    rig.engine.submit(task)
    async with running(rig):
        await rig.heard.finish(task.attempt)
    assert rig.heard.answers[task.attempt] == expected_for(task)


async def test_an_idle_engine_sleeps_until_work_comes() -> None:
    async with running(make_rig()) as rig:
        for name in ("one", "two"):
            task = make_task(name)
            rig.engine.submit(task)
            await rig.heard.finish(task.attempt)
            steps = len(rig.runner.batches)
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(rig.runner.batches) == steps
            rig.assert_idle()


async def test_stop_tokens_end_answers() -> None:
    free = make_task("x", max_tokens=8, ignore_eos=True)
    answer = expected_for(free)
    eos = (answer[2],)
    cases = {
        "eos": (make_task("x", max_tokens=8), 3, FinishReason.STOP),
        "ignored": (free, 8, FinishReason.LENGTH),
        "stop token": (
            make_task("x", max_tokens=8, ignore_eos=True, stop_token_ids=(answer[4],)),
            5,
            FinishReason.STOP,
        ),
        "last allowed": (make_task("x", max_tokens=3), 3, FinishReason.STOP),
        "minimum": (make_task("x", max_tokens=8, min_tokens=4), None, None),
    }
    async with running(make_rig(eos=eos)) as rig:
        for number, (task, length, reason) in enumerate(cases.values()):
            task = replace(task, attempt=AttemptId("x", number))
            rig.engine.submit(task)
            finish = await rig.heard.finish(task.attempt)
            got = rig.heard.answers[task.attempt]
            assert got == expected_for(task, eos)
            if length is None:
                assert len(got) >= 4
                assert got[2] != eos[0]
            else:
                assert (len(got), finish.reason) == (length, reason)


async def test_a_resumed_answer_goes_on_where_it_was() -> None:
    whole = make_task("whole", max_tokens=9, seed=5, repetition_penalty=1.2)
    answer = expected_for(whole)
    async with running(make_rig()) as rig:
        for cut in range(1, 9):
            attempt = AttemptId("whole", cut)
            rig.engine.submit(replace(whole, attempt=attempt, output=tuple(answer[:cut])))
            await rig.heard.finish(attempt)
            assert rig.heard.answers[attempt] == answer[cut:]


async def test_a_resumed_answer_that_was_complete_ends_at_once() -> None:
    async with running(make_rig()) as rig:
        task = make_task("done", max_tokens=2, output=(7, 8))
        rig.engine.submit(task)
        assert rig.heard.finishes[task.attempt].reason is FinishReason.LENGTH
        assert rig.heard.answers[task.attempt] == []


async def test_cached_tokens_are_reported_and_salted() -> None:
    async with running(make_rig()) as rig:
        for number, (salt, cached) in enumerate([("", 0), ("", 8), ("a", 0), ("a", 8)]):
            task = replace(make_task("x", 10, salt=salt), attempt=AttemptId("x", number))
            rig.engine.submit(task)
            assert (await rig.heard.finish(task.attempt)).cached_tokens == cached


async def test_spans_tell_where_the_time_went() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x")
        rig.engine.submit(task)
        finish = await rig.heard.finish(task.attempt)
    *stretches, first_step = finish.spans
    assert [span.name for span in stretches] == ["queue", "prefill", "decode"]
    for before, after in itertools.pairwise(stretches):
        assert before.end_s == after.start_s
    assert first_step.name == "first_step"
    assert stretches[-1].start_s == first_step.start_s < first_step.end_s <= stretches[-1].end_s
    assert stretches[1].counts[:2] == (("tokens", len(task.prompt)), ("cached_tokens", 0))
    assert stretches[-1].counts == (("tokens", task.sampling.max_tokens),)
    assert all(abs(span.start_s - 1e9) < 60 for span in finish.spans), "unix time"


# -- refusals -------------------------------------------------------------------------------


async def test_what_cannot_be_served_is_refused_at_once() -> None:
    async with running(make_rig(num_blocks=4, max_model_len=64, max_waiting=1)) as rig:
        with pytest.raises(InvalidRequest, match="no tokens"):
            rig.engine.submit(make_task("empty", 0))
        with pytest.raises(InvalidRequest, match="at most 64"):
            rig.engine.submit(make_task("long", 64))
        with pytest.raises(InvalidRequest, match="has 4"):
            rig.engine.submit(make_task("big", 17))
        rig.engine.submit(make_task("fits", 16, max_tokens=1))
        with pytest.raises(Overloaded):
            rig.engine.submit(make_task("late"))
        with pytest.raises(StaleAttempt):
            rig.engine.submit(make_task("fits"))
        await rig.heard.finish(AttemptId("fits"))
    with pytest.raises(Overloaded, match="shutting down"):
        rig.engine.submit(make_task("after"))
    assert list(rig.heard.finishes) == [AttemptId("fits")]


def test_the_pool_must_be_the_configured_one() -> None:
    rig = make_rig(num_blocks=4)
    with pytest.raises(InternalError, match="5 blocks"):
        Engine(rig.runner, BlockPool(5), rig.config, rig.heard)


# -- cancellation and deadlines -------------------------------------------------------------


async def test_cancel_in_every_state() -> None:
    gate = Gate()
    async with running(make_rig(max_num_seqs=1, before_step=gate)) as rig:
        executing, waiting = make_task("executing"), make_task("waiting")
        rig.engine.submit(executing)
        rig.engine.submit(waiting)
        await gate.reached()
        rig.engine.cancel(waiting.attempt)
        assert rig.heard.finishes[waiting.attempt].reason is FinishReason.CANCELLED
        rig.engine.cancel(executing.attempt)
        rig.engine.cancel(executing.attempt)
        assert executing.attempt not in rig.heard.finishes, "its step still runs"
        assert rig.in_state(BlockState.ACTIVE) == 3
        gate.let.set()
        assert (await rig.heard.finish(executing.attempt)).reason is FinishReason.CANCELLED
        assert rig.heard.answers[executing.attempt] == []
        rig.engine.cancel(executing.attempt)
        rig.engine.cancel(AttemptId("unknown"))
        rig.assert_idle()


async def test_the_listener_may_cancel_what_it_hears_of() -> None:
    async with running(make_rig()) as rig:
        tasks = [make_task(name, max_tokens=50) for name in ("one", "two")]

        def cancel_both(output: AttemptOutput) -> None:
            for task in tasks:
                rig.engine.cancel(task.attempt)

        rig.heard.on_output = cancel_both
        for task in tasks:
            rig.engine.submit(task)
        for task in tasks:
            assert (await rig.heard.finish(task.attempt)).reason is FinishReason.CANCELLED


async def test_deadlines_end_running_and_waiting_work() -> None:
    gate = Gate()
    async with running(make_rig(max_num_seqs=1, before_step=gate)) as rig:
        tasks = [make_task(name, timeout_s=0.01) for name in ("running", "waiting")]
        for task in tasks:
            rig.engine.submit(task)
        await gate.reached()
        await rig.heard.finish(tasks[1].attempt)
        assert tasks[0].attempt not in rig.heard.finishes
        gate.let.set()
        for task in tasks:
            finish = await rig.heard.finish(task.attempt)
            assert finish.reason is FinishReason.ERROR
            assert finish.error is not None
            assert finish.error.code == "deadline_exceeded"


async def test_a_deadline_that_is_not_reached_leaves_nothing_behind() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", timeout_s=1000)
        rig.engine.submit(task)
        assert (await rig.heard.finish(task.attempt)).reason is FinishReason.LENGTH
        rig.assert_idle()


# -- failures -------------------------------------------------------------------------------


async def test_a_failed_step_ends_its_sequences_and_no_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faulty = Faulty(RuntimeError("device on fire"), {2})
    async with running(make_rig(max_num_seqs=1, before_step=faulty)) as rig:
        bad, good = make_task("bad"), make_task("good")
        rig.engine.submit(bad)
        rig.engine.submit(good)
        finish = await rig.heard.finish(bad.attempt)
        assert finish.reason is FinishReason.ERROR
        assert finish.error is not None
        assert finish.error.code == "internal_error"
        assert "device on fire" in finish.error.message
        assert len(rig.heard.answers[bad.attempt]) == 1
        assert (await rig.heard.finish(good.attempt)).reason is FinishReason.LENGTH
        assert rig.heard.answers[good.attempt] == expected_for(good)
    assert "Step 2 with 1 sequences failed" in caplog.text


async def test_of_several_sequences_nobody_is_to_blame_for_a_failed_step() -> None:
    faulty = Faulty(RuntimeError("logits are not finite"), {1, 2})
    async with running(make_rig(before_step=faulty)) as rig:
        together = [make_task("a"), make_task("b")]
        for task in together:
            rig.engine.submit(task)
        for task in together:
            finish = await rig.heard.finish(task.attempt)
            assert finish.error is not None
            assert (finish.error.code, finish.error.retryable) == ("internal_error", True)
        alone = make_task("c")
        rig.engine.submit(alone)
        finish = await rig.heard.finish(alone.attempt)
        assert finish.error is not None
        assert (finish.error.code, finish.error.retryable) == ("internal_error", False)


async def test_a_named_error_keeps_its_code() -> None:
    faulty = Faulty(TransportError("lost"), {1})
    async with running(make_rig(before_step=faulty)) as rig:
        rig.engine.submit(make_task("x"))
        finish = await rig.heard.finish(AttemptId("x"))
        assert finish.error is not None
        assert (finish.error.code, finish.error.retryable) == ("transport_error", True)


async def test_failures_in_a_row_end_the_engine_and_everything_in_it() -> None:
    rig = make_rig(max_num_seqs=1, before_step=Faulty(RuntimeError("broken"), {1, 2, 4, 5, 6}))
    tasks = [make_task(f"t{i}", max_tokens=1) for i in range(8)]
    for task in tasks:
        rig.engine.submit(task)
    with pytest.raises(InternalError, match=f"{MAX_FAILURES} steps in a row"):
        await rig.engine.run()
    rig.assert_idle()
    finishes = [rig.heard.finishes[task.attempt] for task in tasks]
    assert finishes.pop(2).reason is FinishReason.LENGTH
    assert {finish.reason for finish in finishes} == {FinishReason.ERROR}
    last = finishes[-1].error
    assert last is not None
    assert last.retryable  # it had not even begun


class Liar(FakeRunner):
    """Answers what was not asked."""

    answer: tuple[SampledToken | None, ...] = ()

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        return Computed(BatchResult(self.answer))


@pytest.mark.parametrize("answer", [(), (None,), (SampledToken(1, 7),)])
async def test_a_runner_that_answers_something_else_is_a_failure(
    answer: tuple[SampledToken | None, ...],
) -> None:
    rig = make_rig()
    liar = Liar()
    liar.answer = answer
    rig.engine = Engine(liar, rig.pool, rig.config, rig.heard)
    async with running(rig):
        rig.engine.submit(make_task("x"))
        finish = await rig.heard.finish(AttemptId("x"))
        assert finish.error is not None
        assert "The runner" in finish.error.message


# -- shutdown -------------------------------------------------------------------------------


async def stopped_while_busy(rig: Rig, gate: Gate) -> None:
    rig.engine.submit(make_task("executing"))
    rig.engine.submit(make_task("waiting"))
    await gate.reached()


async def test_stop_lets_the_step_end_and_cancels_the_rest() -> None:
    gate = Gate()
    async with running(make_rig(max_num_seqs=1, before_step=gate)) as rig:
        await stopped_while_busy(rig, gate)
        rig.engine.stop()
        gate.let.set()
    reasons = {finish.reason for finish in rig.heard.finishes.values()}
    assert (len(rig.heard.finishes), reasons) == (2, {FinishReason.CANCELLED})
    assert len(rig.heard.answers[AttemptId("executing")]) == 1


@pytest.mark.parametrize("fails", [False, True])
async def test_cancelling_run_waits_for_the_thread_and_frees_everything(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    rig = make_rig(max_num_seqs=1, before_step=gate)
    run = asyncio.create_task(rig.engine.run())
    await stopped_while_busy(rig, gate)
    for _ in range(3):
        run.cancel()
        await asyncio.sleep(0)
    assert not run.done()
    assert rig.in_state(BlockState.ACTIVE) == 3
    if fails:
        rig.runner.memory.blocks = None  # type: ignore[assignment]
    gate.let.set()
    with pytest.raises(asyncio.CancelledError):
        await run
    rig.assert_idle()
    assert {f.reason for f in rig.heard.finishes.values()} == {FinishReason.CANCELLED}
    assert any(record.levelno == logging.ERROR for record in caplog.records) == fails
    assert not [t for t in threading.enumerate() if t.name.startswith("engine-step")]
