"""Prefill and decode services together: the handoff's happy way and every way out of it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from baton.engine.batch import Batch
from baton.kv.transport.loopback import Fault
from baton.types.link import Cancel, StartDecode, StartPrefill
from baton.types.request import AttemptId, FinishReason, GenerationTask, SamplingParams
from tests.fake_runner import VOCAB, expected_answer
from tests.unit.worker_rig import OPTIONS, PREFILL, Pair, is_idle, running_pair


def make_task(
    name: str, prompt_len: int = 30, max_tokens: int = 6, **more: object
) -> GenerationTask:
    prompt = tuple((sum(name.encode()) + 7 * i) % 900 for i in range(prompt_len))
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return replace(GenerationTask(AttemptId(name), prompt, params), **more)


def expected(task: GenerationTask) -> list[int]:
    return expected_answer(task.prompt, task.sampling, output=task.output)[len(task.output) :]


async def start(pair: Pair, task: GenerationTask) -> None:
    await pair.to_prefill.send(StartPrefill(task))
    await pair.to_decode.send(StartDecode(task, pair.peer))


class Gate:
    """Holds an engine's steps until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.entered.set()
        assert self.opened.wait(20)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)


class Reads:
    """A fault plan: the same fault for every read."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        return self.fault


async def test_split_answers_are_the_answers_of_one_worker() -> None:
    async with running_pair() as pair:
        tasks = [make_task(f"t{n}", 1 + 9 * n, 1 + n) for n in range(8)]
        for task in tasks:
            await start(pair, task)
        for task in tasks:
            prefill = await pair.to_prefill.finish(task.attempt)
            decode = await pair.to_decode.finish(task.attempt)
            if task.sampling.max_tokens == 1:
                assert prefill.reason is FinishReason.LENGTH
                assert decode.reason is FinishReason.CANCELLED
            else:
                assert prefill.reason is FinishReason.HANDED_OFF
                assert decode.reason is FinishReason.LENGTH
            assert pair.answer(task.attempt) == expected(task)


async def test_the_first_token_comes_from_prefill_and_the_rest_from_decode() -> None:
    async with running_pair() as pair:
        task = make_task("t")
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        assert pair.to_prefill.answer(task.attempt) == expected(task)[:1]
        assert pair.to_decode.answer(task.attempt) == expected(task)[1:]


async def test_a_resumed_answer_goes_on_after_what_the_client_has() -> None:
    async with running_pair() as pair:
        whole = expected(make_task("t", max_tokens=8))
        task = make_task("t", max_tokens=8, output=tuple(whole[:3]))
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        assert sorted(pair.to_decode.tokens[task.attempt]) == [4, 5, 6, 7]
        assert pair.to_prefill.answer(task.attempt) == whole[3:4]
        assert pair.to_decode.answer(task.attempt) == whole[4:]


async def test_without_a_peer_the_decode_worker_computes_the_prompt() -> None:
    async with running_pair() as pair:
        task = make_task("alone", 50)
        await pair.to_decode.send(StartDecode(task))
        assert (await pair.to_decode.finish(task.attempt)).reason is FinishReason.LENGTH
        assert pair.to_decode.answer(task.attempt) == expected(task)


async def test_cancel_during_prefill_ends_both_sides() -> None:
    gate = Gate()
    async with running_pair(before_prefill=gate) as pair:
        task = make_task("t")
        await start(pair, task)
        await gate.reached()
        for link in (pair.to_prefill, pair.to_decode):
            await link.send(Cancel(task.attempt, "test"))
        assert (await pair.to_decode.finish(task.attempt)).reason is FinishReason.CANCELLED
        gate.opened.set()
        prefill = await pair.to_prefill.finish(task.attempt)
        assert prefill.reason in (FinishReason.CANCELLED, FinishReason.ERROR)


async def test_cancel_while_kv_is_read_quarantines_until_the_read_is_over() -> None:
    async with running_pair(Reads(Fault(delay_s=0.3))) as pair:
        task = make_task("t")
        await start(pair, task)
        await pair.to_prefill.token(task.attempt)
        await pair.to_decode.send(Cancel(task.attempt, "test"))
        assert (await pair.to_decode.finish(task.attempt)).reason is FinishReason.CANCELLED
        prefill = await pair.to_prefill.finish(task.attempt)
        assert prefill.error is not None
        assert (prefill.reason, prefill.error.code) == (FinishReason.ERROR, "peer_gone")
        assert prefill.error.retryable


async def test_conductors_hear_of_blocks_that_come_free_after_the_finish() -> None:
    """At whatever moment of taking over the cancellation comes."""
    async with running_pair() as pair:
        for moment in range(60):
            task = make_task(f"t{moment}")
            await start(pair, task)
            for _ in range(moment):
                await asyncio.sleep(0)
            for link in (pair.to_prefill, pair.to_decode):
                await link.send(Cancel(task.attempt, "test"))
            for link in (pair.to_prefill, pair.to_decode):
                await link.finish(task.attempt)
                await link.until(lambda link=link: is_idle(link.loads[-1]))


async def test_cancel_while_decoding_frees_the_blocks() -> None:
    gate = Gate()
    async with running_pair(before_decode=gate) as pair:
        task = make_task("t", max_tokens=50)
        await start(pair, task)
        await gate.reached()  # it was admitted
        await pair.to_decode.send(Cancel(task.attempt, "test"))
        gate.opened.set()
        assert (await pair.to_decode.finish(task.attempt)).reason is FinishReason.CANCELLED


async def test_a_failed_read_is_a_retryable_error() -> None:
    async with running_pair(Reads(Fault(error="the link is down"))) as pair:
        task = make_task("t")
        await start(pair, task)
        finish = await pair.to_decode.finish(task.attempt)
        assert finish.error is not None
        assert (finish.reason, finish.error.retryable) == (FinishReason.ERROR, True)
        assert "the link is down" in finish.error.message
        assert (await pair.to_prefill.finish(task.attempt)).reason is FinishReason.ERROR


async def test_corrupt_bytes_never_become_tokens() -> None:
    async with running_pair(Reads(Fault(corrupt=True))) as pair:
        task = make_task("t")
        await start(pair, task)
        finish = await pair.to_decode.finish(task.attempt)
        assert finish.error is not None
        assert finish.error.code == "digest_mismatch"
        assert pair.to_decode.answer(task.attempt) == []


async def test_a_dead_prefill_worker_is_a_retryable_error() -> None:
    gate = Gate()
    async with running_pair(before_prefill=gate) as pair:
        task = make_task("t")
        await start(pair, task)
        await gate.reached()
        pair.network.kill(PREFILL)
        finish = await pair.to_decode.finish(task.attempt)
        assert finish.error is not None
        assert (finish.error.code, finish.error.retryable) == ("peer_gone", True)
        gate.opened.set()


async def test_a_former_life_of_the_prefill_worker_is_gone() -> None:
    async with running_pair() as pair:
        task = make_task("t")
        old = replace(pair.peer, incarnation="before-the-restart")
        await pair.to_decode.send(StartDecode(task, old))
        finish = await pair.to_decode.finish(task.attempt)
        assert finish.error is not None
        assert finish.error.code == "peer_gone"
        assert finish.error.retryable


async def test_kv_that_nobody_takes_over_is_freed_when_its_lease_ends() -> None:
    async with running_pair(options=replace(OPTIONS, lease_ttl_s=0.2)) as pair:
        task = make_task("t")
        await pair.to_prefill.send(StartPrefill(task))
        finish = await pair.to_prefill.finish(task.attempt)
        assert finish.error is not None
        assert (finish.error.code, finish.error.retryable) == ("lease_expired", True)
        assert pair.to_prefill.answer(task.attempt) == expected(task)[:1]


async def test_a_lease_that_ends_during_prefill_stops_the_work() -> None:
    def slow(batch: Batch) -> None:
        threading.Event().wait(0.15)

    options = replace(OPTIONS, lease_ttl_s=0.1)
    async with running_pair(options=options, before_prefill=slow) as pair:
        task = make_task("t", 150)
        await pair.to_prefill.send(StartPrefill(task))
        finish = await pair.to_prefill.finish(task.attempt)
        assert finish.error is not None
        assert finish.error.code == "lease_expired"
        assert pair.to_prefill.answer(task.attempt) == []


@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_a_prompt_that_can_never_fit_is_the_requests_fault_on_both_sides(
    first: str,
) -> None:
    async with running_pair() as pair:
        task = make_task("long", 200)
        if first == "prefill":
            await start(pair, task)
        else:
            await pair.to_decode.send(StartDecode(task, pair.peer))
            await pair.to_prefill.send(StartPrefill(task))
        for link in (pair.to_prefill, pair.to_decode):
            finish = await link.finish(task.attempt)
            assert finish.error is not None
            assert (finish.error.client_fault, finish.error.retryable) == (True, False)


async def test_a_deadline_covers_the_handoff() -> None:
    gate = Gate()
    async with running_pair(before_prefill=gate) as pair:
        task = make_task("t", timeout_s=0.2)
        await start(pair, task)
        finish = await pair.to_decode.finish(task.attempt)
        assert finish.error is not None
        assert finish.error.code == "deadline_exceeded"
        gate.opened.set()
        prefill = await pair.to_prefill.finish(task.attempt)
        assert prefill.reason is FinishReason.ERROR


async def test_each_worker_refuses_the_others_work() -> None:
    async with running_pair() as pair:
        task = make_task("t")
        await pair.to_prefill.send(StartDecode(task))
        await pair.to_decode.send(StartPrefill(task))
        for link in (pair.to_prefill, pair.to_decode):
            finish = await link.finish(task.attempt)
            assert finish.error is not None
            assert finish.error.code == "invalid_request_error"


async def test_a_broken_link_cancels_what_was_begun_on_it() -> None:
    gate = Gate()
    async with running_pair(before_prefill=gate) as pair:
        await start(pair, make_task("t"))
        await gate.reached()
        await pair.to_prefill.stream.aclose()
        await pair.to_decode.stream.aclose()
        gate.opened.set()
        await pair.until_idle()


async def test_many_attempts_cancelled_at_random_leave_nothing() -> None:
    async with running_pair(Reads(Fault(delay_s=0.001))) as pair:
        tasks = [make_task(f"t{n}", 5 + 3 * n % 60, 12) for n in range(30)]
        for number, task in enumerate(tasks):
            await start(pair, task)
            if number % 3 == 0:
                await asyncio.sleep(0.002 * (number % 5))
                await pair.to_prefill.send(Cancel(task.attempt, "test"))
                await pair.to_decode.send(Cancel(task.attempt, "test"))
        for number, task in enumerate(tasks):
            await pair.to_prefill.finish(task.attempt)
            finish = await pair.to_decode.finish(task.attempt)
            if number % 3:
                assert finish.reason is FinishReason.LENGTH
                assert pair.answer(task.attempt) == expected(task)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": (1, VOCAB, 2)},
        {"output": (VOCAB,)},
        {"sampling": SamplingParams(stop_token_ids=(3, VOCAB), min_tokens=2)},
        {"sampling": SamplingParams(logit_bias=((1, 1.0), (VOCAB, -1.0)))},
    ],
)
async def test_a_token_that_no_model_has_fails_its_request_and_no_other(
    wrong: dict[str, object],
) -> None:
    async with running_pair() as pair:
        good, bad, whole = make_task("good"), make_task("bad", **wrong), make_task("whole", **wrong)
        await start(pair, good)
        await start(pair, bad)
        await pair.to_decode.send(StartDecode(whole))
        for link, task in ((pair.to_prefill, bad), (pair.to_decode, bad), (pair.to_decode, whole)):
            error = (await link.finish(task.attempt)).error
            assert error is not None
            assert error.client_fault
            assert f"{VOCAB} is out of range" in error.message
        assert (await pair.to_decode.finish(good.attempt)).reason is FinishReason.LENGTH
        assert pair.answer(good.attempt) == expected(good)
