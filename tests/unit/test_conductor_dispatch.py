"""Dispatch with fake workers, in virtual time: merging, endings, retries, losses, deadlines."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NoWorker,
    Overloaded,
)
from baton.rpc.memory import Fault
from baton.types.fleet import Role
from baton.types.link import StepReport
from baton.types.request import FinishReason, GenerationTask, WireError
from conductor import dispatch
from conductor.answer_run import Delta
from conductor.dispatch import Usage
from conductor.request import Ask, Options
from conductor.retries import RetryOptions
from conductor.service import Conductor, Policy
from conductor.trace_json import timeline_json
from tests.fake_worker import EOS, Meeting, Script, echo, fake_cluster, say, wait_for
from tests.virtual_time import virtual_time


async def ask(
    conductor: Conductor, prompt: str = "hello", timeout_s: float | None = None, **options: object
) -> tuple[list[Delta], Usage]:
    request = await conductor.prepare(
        Ask("tiny", (prompt,), Options(**options)),
        "test",
        timeout_s,  # type: ignore[arg-type]
    )
    deltas: list[Delta] = []
    usage = Usage(0, 0, 0)
    async with aclosing(conductor.generate(request)) as results:
        async for result in results:
            if isinstance(result, Usage):
                usage = result
            else:
                deltas += result
    return deltas, usage


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def reason_of(deltas: list[Delta], index: int = 0) -> list[str]:
    return [d.finish_reason for d in deltas if d.index == index and d.finish_reason]


@virtual_time
@pytest.mark.parametrize("prefill", [0, 1, 2])
async def test_an_answer_ends_once_and_hides_the_end_token(prefill: int) -> None:
    async with fake_cluster(prefill=prefill) as cluster:
        deltas, usage = await ask(cluster.conductor, "hello", max_tokens=50)
        assert text_of(deltas) == "hello"
        assert reason_of(deltas) == ["stop"]
        assert usage == Usage(prompt_tokens=5, completion_tokens=6, cached_tokens=0)
        await cluster.check_nothing_left()


@virtual_time
async def test_the_first_token_may_end_the_answer_at_the_prefill_worker() -> None:
    async with fake_cluster(say("abc")) as cluster:
        deltas, usage = await ask(cluster.conductor, max_tokens=1)
        assert (text_of(deltas), reason_of(deltas)) == ("a", ["length"])
        assert usage.completion_tokens == 1
        await cluster.check_nothing_left()


@virtual_time
async def test_end_token_first_gives_an_empty_answer() -> None:
    async with fake_cluster(say("")) as cluster:
        deltas, usage = await ask(cluster.conductor, max_tokens=9)
        assert (text_of(deltas), reason_of(deltas)) == ("", ["stop"])
        assert usage.completion_tokens == 1
        await cluster.check_nothing_left()


@virtual_time
async def test_n_answers_run_as_attempts_of_their_own_with_their_own_seeds() -> None:
    async with fake_cluster() as cluster:
        deltas, usage = await ask(cluster.conductor, "ab", n=3, seed=7, max_tokens=9)
        assert [text_of(deltas, index) for index in range(3)] == ["ab"] * 3
        tasks = cluster.workers["decode-0"].tasks
        assert sorted(task.sampling.seed for task in tasks) == [7, 8, 9]
        assert len({task.attempt.request_id for task in tasks}) == 3
        assert usage == Usage(prompt_tokens=2, completion_tokens=9, cached_tokens=0)


@virtual_time
async def test_stop_string_across_tokens_cancels_both_workers() -> None:
    async with fake_cluster(say("one STOP two", hang_at=8, cached_tokens=3)) as cluster:
        deltas, usage = await ask(cluster.conductor, stop=("STOP",), max_tokens=50)
        assert (text_of(deltas), reason_of(deltas)) == ("one ", ["stop"])
        assert usage.completion_tokens == len("one STOP")
        assert usage.cached_tokens == 3
        assert cluster.workers["decode-0"].cancelled
        await cluster.check_nothing_left()


@virtual_time
async def test_cached_tokens_are_known_also_when_the_first_token_ends_the_answer() -> None:
    def late_endings(sender: str, receiver: str, message: object) -> Fault:
        ending = isinstance(message, StepReport) and any(o.finish for o in message.outputs)
        return Fault(delay_s=0.3 if ending and sender.startswith("prefill") else 0.0)

    async with fake_cluster(say("one", cached_tokens=3)) as cluster:
        decode = cluster.workers["decode-0"]
        decode.script = say("one")
        decode.meeting = Meeting()  # it has not taken over when it is cancelled
        cluster.network.plan.on_message = late_endings  # type: ignore[method-assign]
        deltas, usage = await ask(cluster.conductor, stop=("o",), max_tokens=50)
        assert (text_of(deltas), reason_of(deltas)) == ("", ["stop"])
        assert usage.cached_tokens == 3


@virtual_time
async def test_cached_tokens_come_from_the_workers() -> None:
    async with fake_cluster(say("x", cached_tokens=4)) as cluster:
        _, usage = await ask(cluster.conductor, "hello", n=2, max_tokens=5)
        assert usage.cached_tokens == 4


@virtual_time
async def test_closing_early_cancels_both_workers() -> None:
    async with fake_cluster(say("hello", hang_at=3)) as cluster:
        request = await cluster.conductor.prepare(Ask("tiny", ("x",), Options()), "test")
        async with aclosing(cluster.conductor.generate(request)) as results:
            async for _ in results:
                break
        await cluster.check_nothing_left()
        outcome = cluster.conductor.traces.get(request.id)
        assert outcome is not None
        assert outcome.outcome == "cancelled"


@virtual_time
async def test_a_client_that_does_not_keep_up_loses_its_answer_and_nobody_else_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "MAX_UNREAD", 200)  # more than a link holds
    async with fake_cluster(say("x" * 400, hang_at=399)) as cluster:
        conductor = cluster.conductor
        request = await conductor.prepare(
            Ask("tiny", ("slow",), Options(max_tokens=450)), "test", 50.0
        )
        async with aclosing(conductor.generate(request)) as results:
            first = await anext(results)
            assert isinstance(first, list)
            await wait_for(lambda: not any(worker.live for worker in cluster.workers.values()))
            cluster.workers["decode-0"].script = say("hello")
            deltas, _ = await ask(conductor, "other", max_tokens=50)
            assert text_of(deltas) == "xello"  # the first from the other worker
            with pytest.raises(Cancelled, match="too slowly"):
                await anext(results)
        assert request.deadline > asyncio.get_running_loop().time()
        await cluster.check_nothing_left()


@virtual_time
async def test_cancelling_the_task_cancels_both_workers() -> None:
    async with fake_cluster(say("hello", hang_at=0)) as cluster:
        task = asyncio.create_task(ask(cluster.conductor))
        workers = cluster.workers.values()
        await wait_for(lambda: all(worker.live for worker in workers))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cluster.check_nothing_left()


@virtual_time
async def test_an_answer_that_was_complete_by_its_deadline_is_no_error_when_it_is_read_later() -> (
    None
):
    async with fake_cluster(say("x" * 400)) as cluster:
        request = await cluster.conductor.prepare(
            Ask("tiny", ("x",), Options(max_tokens=450)), "test", 3.0
        )
        deltas: list[Delta] = []
        async with aclosing(cluster.conductor.generate(request)) as results:
            async for result in results:
                if isinstance(result, list):
                    if not deltas:
                        await asyncio.sleep(5.0)  # meanwhile the rest comes, then the deadline
                    deltas += result
        assert (text_of(deltas), reason_of(deltas)) == ("x" * 400, ["stop"])
        await cluster.check_nothing_left()


@virtual_time
async def test_the_deadline_ends_the_request_at_both_workers() -> None:
    async with fake_cluster(say("hello", hang_at=2)) as cluster:
        with pytest.raises(DeadlineExceeded):
            await ask(cluster.conductor, timeout_s=3.0)
        assert asyncio.get_running_loop().time() == pytest.approx(3.0, abs=0.1)
        assert cluster.workers["prefill-0"].tasks[0].timeout_s == pytest.approx(3.0, abs=0.1)
        await cluster.check_nothing_left()


@virtual_time
async def test_a_failure_that_is_not_retryable_is_the_request_s_error() -> None:
    async with fake_cluster(say("hello", error_at=2)) as cluster:
        with pytest.raises(BatonError, match="a bug") as caught:
            await ask(cluster.conductor)
        assert caught.value.code == InternalError.code
        await cluster.check_nothing_left()
        assert len(cluster.workers["decode-0"].tasks) == 1


@virtual_time
async def test_a_retryable_failure_before_the_first_token_tries_other_workers() -> None:
    failing = WireError("transport_error", "no route", retryable=True)

    def script(task: GenerationTask) -> Script:
        broken = task.attempt.number < 2
        return Script((*b"fine", EOS), error_at=0 if broken else None, error=failing)

    async with fake_cluster(script) as cluster:
        deltas, _ = await ask(cluster.conductor)
        assert text_of(deltas) == "fine"
        tasks = cluster.workers["prefill-0"].tasks
        assert [task.attempt.number for task in tasks] == [0, 1, 2]
        await cluster.check_nothing_left()


@virtual_time
@pytest.mark.parametrize("split", [False, True])
async def test_another_attempt_prefers_other_workers(split: bool) -> None:
    failing = WireError("transport_error", "no route", retryable=True)
    counts = {"prefill": 2, "decode": 1} if split else {"prefill": 0, "decode": 2}
    async with fake_cluster(say("ok"), **counts) as cluster:
        name = "prefill-0" if split else "decode-0"
        cluster.workers[name].script = say("ok", error_at=0, error=failing)
        for _ in range(12):  # each begins where the hash of its id says
            deltas, _ = await ask(cluster.conductor)
            assert text_of(deltas) == "ok"
        await cluster.check_nothing_left()


@virtual_time
async def test_retries_end_with_the_error() -> None:
    failing = WireError("transport_error", "no route", retryable=True)
    async with fake_cluster(say("x", error_at=0, error=failing)) as cluster:
        with pytest.raises(BatonError, match="no route"):
            await ask(cluster.conductor)
        assert len(cluster.workers["prefill-0"].tasks) == RetryOptions().failures
        await cluster.check_nothing_left()


@virtual_time
async def test_a_full_worker_is_overload_unless_another_one_can_take_it() -> None:
    full = WireError("overloaded", "queue is full", retryable=True)
    async with fake_cluster(say("x", error_at=0, error=full), prefill=0) as cluster:
        with pytest.raises(Overloaded, match="queue is full"):
            await ask(cluster.conductor)
        await cluster.add(Role.DECODE, "decode-9", say("ok"))
        results = [text_of((await ask(cluster.conductor))[0]) for _ in range(6)]
        assert results == ["ok"] * 6
        await cluster.check_nothing_left()


@virtual_time
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
async def test_a_lost_worker_before_the_first_token_leads_to_another_one(victim: str) -> None:
    async with fake_cluster(say("abc", hang_at=0), prefill=1, decode=1) as cluster:
        task = asyncio.create_task(ask(cluster.conductor))
        await wait_for(lambda: all(worker.live for worker in cluster.workers.values()))
        await cluster.add(Role.PREFILL, "prefill-1", say("new"))
        await cluster.add(Role.DECODE, "decode-1", say("new"))
        for worker in cluster.workers.values():
            worker.script = say("new")
        cluster.network.kill(f"{victim}:1")
        deltas, _ = await task
        assert text_of(deltas) == "new"
        await cluster.check_nothing_left()


@virtual_time
async def test_a_prefill_worker_lost_after_the_handoff_does_not_matter() -> None:
    async with fake_cluster(say("abc")) as cluster:
        decode = cluster.workers["decode-0"]
        decode.script = say("abc", hang_at=2)
        task = asyncio.create_task(ask(cluster.conductor))
        await wait_for(lambda: not cluster.workers["prefill-0"].live and bool(decode.live))
        cluster.network.kill("prefill-0:1")
        await asyncio.sleep(20)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.check_nothing_left()


@virtual_time
async def test_a_prefill_worker_lost_during_the_handoff_is_noticed_in_time() -> None:
    async with fake_cluster(say("abc", hang_at=0), decode=1) as cluster:
        cluster.workers["decode-0"].script = say("abc")
        task = asyncio.create_task(ask(cluster.conductor))
        await wait_for(lambda: bool(cluster.workers["prefill-0"].live))
        cluster.network.kill("prefill-0:1")
        start = asyncio.get_running_loop().time()
        deltas, _ = await task  # tried again without the prefill worker
        assert text_of(deltas) == "abc"
        assert asyncio.get_running_loop().time() - start < 1  # whatever the decode worker does
        await cluster.check_nothing_left()


@virtual_time
@pytest.mark.parametrize("decode_first", [False, True])
async def test_a_first_token_lost_with_its_worker_is_not_waited_for(decode_first: bool) -> None:
    def late(sender: str, receiver: str, message: object) -> Fault:
        slow = sender.startswith("prefill") or not decode_first
        return Fault(delay_s=1.0 if slow and isinstance(message, StepReport) else 0.0)

    async with fake_cluster(say("long", hang_at=3)) as cluster:
        cluster.network.plan.on_message = late  # type: ignore[method-assign]
        task = asyncio.create_task(ask(cluster.conductor, timeout_s=100))
        await asyncio.sleep(0.5)  # the handoff is over, the first token is under way
        for link in cluster.workers["prefill-0"].links:
            link._out.end("lost", discard=True)  # type: ignore[attr-defined]
        cluster.network.kill("prefill-0:1")
        cluster.workers["decode-0"].script = say("again")
        deltas, _ = await task
        assert text_of(deltas) == "again"
        assert asyncio.get_running_loop().time() < 4
        await cluster.check_nothing_left()


@virtual_time
async def test_no_worker_and_shutting_down() -> None:
    async with fake_cluster(prefill=1, decode=0) as cluster:
        assert not cluster.conductor.ready
        with pytest.raises(NoWorker, match="no decode worker has registered"):
            await ask(cluster.conductor)
        await cluster.add(Role.DECODE, "decode-0", echo)
        assert cluster.conductor.ready
        cluster.conductor.admission.close()
        assert not cluster.conductor.ready
        with pytest.raises(NoWorker, match="shutting down"):
            await ask(cluster.conductor)


@virtual_time
async def test_abort_all_ends_running_requests() -> None:
    async with fake_cluster(say("abc", hang_at=1)) as cluster:
        task = asyncio.create_task(ask(cluster.conductor))
        await wait_for(lambda: cluster.conductor.running == 1)
        cluster.conductor.abort_all(NoWorker("closing"))
        with pytest.raises(NoWorker, match="closing"):
            await task
        await cluster.check_nothing_left()


@virtual_time
async def test_the_bound_on_work_in_progress() -> None:
    policy = Policy(lease_ttl_s=1e6, max_answers=2)
    async with fake_cluster(say("abc", hang_at=1), policy=policy) as cluster:
        first = asyncio.create_task(ask(cluster.conductor, n=2))
        await wait_for(lambda: cluster.conductor.running == 1)
        with pytest.raises(Overloaded, match="the bound is 2"):
            await ask(cluster.conductor)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        for worker in cluster.workers.values():
            worker.script = echo
        deltas, _ = await ask(cluster.conductor, n=4)  # alone, more than the bound is let in
        assert len([delta for delta in deltas if delta.finish_reason]) == 4
        await cluster.check_nothing_left()


@virtual_time
async def test_traces_tell_workers_reasons_and_spans() -> None:
    async with fake_cluster() as cluster:
        await ask(cluster.conductor)
        await asyncio.sleep(0.1)
        request_id = next(iter(cluster.conductor.traces._timelines))
        timeline = cluster.conductor.traces.get(request_id)
        assert timeline is not None
        body = timeline_json(timeline, now_s=0.0)
        assert body["outcome"] == "ok"
        assert body["attempts"][0]["prefill"] == "prefill-0"
        assert body["attempts"][0]["ended"] == "complete"
        assert {span["name"] for span in body["spans"]} == {
            "request", "first_token", "prefill", "decode",
        }  # fmt: skip


@virtual_time
async def test_ignored_end_of_sequence_is_not_the_end() -> None:
    def script(task: GenerationTask) -> Script:
        return Script((97, EOS, 98, 99), FinishReason.LENGTH)

    async with fake_cluster(script) as cluster:
        deltas, usage = await ask(cluster.conductor, ignore_eos=True, max_tokens=4)
        assert (text_of(deltas), reason_of(deltas)) == ("abc", ["length"])
        assert usage.completion_tokens == 4
