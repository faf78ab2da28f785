"""Attempts that fail with tokens on their way to the client: another one goes on, unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from itertools import pairwise

import pytest

from baton.errors import (
    DeadlineExceeded,
    NoWorker,
    Overloaded,
    PoisonRequest,
    WorkerLost,
    WorkerMoved,
)
from baton.rpc.memory import Fault
from baton.types.fleet import Role
from baton.types.kv_events import KvSnapshot, Tier
from baton.types.link import StepReport
from baton.types.request import FinishReason, GenerationTask, WireError
from conductor import attempts
from conductor.answer_run import Delta
from conductor.dispatch import Usage
from conductor.request import Ask, Options
from conductor.retries import RetryOptions
from conductor.router import RouteRequest, route
from conductor.service import Policy
from conductor.trace_json import timeline_json
from tests.fake_worker import (
    BLOCK_SIZE,
    EOS,
    FakeCluster,
    FakeWorker,
    Script,
    Scripts,
    fake_cluster,
    say,
    wait_for,
)
from tests.unit.test_conductor_dispatch import ask, reason_of, text_of
from tests.virtual_time import settle, virtual_time

FAILING = WireError("lease_expired", "too late", retryable=True)


def tokens_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token.token_id for delta in deltas if delta.index == index for token in delta.tokens]


def only_first(script: Script) -> Scripts:
    """`script` goes wrong in the first attempt; later ones say it to its end."""
    whole = Script(script.tokens, script.finish, cached_tokens=script.cached_tokens)
    return lambda task: whole if task.attempt.number else script


@asynccontextmanager
async def dying(
    text: str | bytes, at: int, prefill: int = 2, victim: str = "", **script: int
) -> AsyncIterator[FakeCluster]:
    """A cluster in which the worker that decodes (or `victim`) is killed before token `at`."""
    raw = text.encode() if isinstance(text, str) else text
    first = Script((*raw, EOS), hang_at=at, **script)  # type: ignore[arg-type]
    async with fake_cluster(only_first(first), prefill=prefill, decode=2) as cluster:

        async def kill() -> None:
            def busy() -> list[FakeWorker]:
                role = Role.PREFILL if victim == "prefill" else Role.DECODE
                return [w for w in cluster.workers.values() if w.info.role is role and w.live]

            await wait_for(lambda: bool(busy()))
            await asyncio.sleep(1.0)  # until everything that was said has arrived
            cluster.network.kill(busy()[0].info.address)

        killing = asyncio.create_task(kill())
        yield cluster
        await killing
        await cluster.check_nothing_left()


def resumed_tasks(cluster: FakeCluster) -> list[GenerationTask]:
    return [task for w in cluster.workers.values() for task in w.tasks if task.attempt.number]


@virtual_time
@pytest.mark.parametrize("prefill", [0, 2])
@pytest.mark.parametrize("at", [1, 2, 5])
async def test_the_stream_goes_on_on_another_worker(prefill: int, at: int) -> None:
    async with dying("abcdef", at, prefill) as cluster:
        deltas, usage = await ask(cluster.conductor, max_tokens=20, seed=7)
        assert (text_of(deltas), reason_of(deltas)) == ("abcdef", ["stop"])
        assert tokens_of(deltas) == [*b"abcdef", EOS]
        assert usage == Usage(prompt_tokens=5, completion_tokens=7, cached_tokens=0)
        resumed = resumed_tasks(cluster)
        assert {task.output for task in resumed} == {tuple(b"abcdef"[:at])}
        assert {task.sampling.seed for task in resumed} == {7}
        metrics = cluster.conductor.metrics
        assert metrics.resumes._value.get() == 1
        assert metrics.retries.labels("worker_lost")._value.get() == 1


@virtual_time
async def test_a_retryable_error_in_the_middle_is_resumed_too() -> None:
    script = only_first(Script((*b"abcdef", EOS), error_at=3, error=FAILING))
    async with fake_cluster(script) as cluster:
        deltas, _ = await ask(cluster.conductor)
        assert tokens_of(deltas) == [*b"abcdef", EOS]
        assert cluster.conductor.metrics.retries.labels("lease_expired")._value.get() == 1
        await cluster.check_nothing_left()


@virtual_time
async def test_an_answer_whose_worker_moves_goes_on_where_its_prompt_was_computed() -> None:
    moved = WireError(WorkerMoved.code, "another role", retryable=True)
    script = only_first(Script((*b"abcdef", EOS), error_at=3, error=moved))
    async with fake_cluster(script, prefill=8) as cluster:
        deltas, _ = await ask(cluster.conductor)
        assert tokens_of(deltas) == [*b"abcdef", EOS]
        computed = [w for w in cluster.workers.values() if w.info.role is Role.PREFILL and w.tasks]
        assert [len(worker.tasks) for worker in computed] == [2]
        assert cluster.conductor.metrics.retries.labels("worker_moved")._value.get() == 1
        await cluster.check_nothing_left()


@virtual_time
async def test_each_of_several_answers_is_resumed_by_itself() -> None:
    script = only_first(Script((*b"abcdef", EOS), error_at=3, error=FAILING))
    async with fake_cluster(script, decode=2) as cluster:
        deltas, usage = await ask(cluster.conductor, n=3, max_tokens=20)
        for index in range(3):
            assert tokens_of(deltas, index) == [*b"abcdef", EOS]
        assert usage.completion_tokens == 21


@virtual_time
async def test_a_character_and_a_stop_string_may_span_the_break() -> None:
    euro = "€".encode()
    async with dying(b"x" + euro + b" ST" + b"OP tail", 2) as cluster:  # within the character
        deltas, _ = await ask(cluster.conductor, stop=("STOP",), max_tokens=30)
        assert (text_of(deltas), reason_of(deltas)) == ("x€ ", ["stop"])
    async with dying(b"x" + euro + b" ST" + b"OP tail", 7) as cluster:  # within the stop string
        deltas, _ = await ask(cluster.conductor, stop=("STOP",), max_tokens=30)
        assert (text_of(deltas), reason_of(deltas)) == ("x€ ", ["stop"])


@virtual_time
async def test_logprobs_go_on() -> None:
    async with dying("abcd", 2) as cluster:
        deltas, _ = await ask(cluster.conductor, logprobs=2, max_tokens=20)
        tokens = [token for delta in deltas for token in delta.tokens]
        assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
        assert all(token.logprob is not None and len(token.logprob.top) == 2 for token in tokens)
        assert [o for d in deltas for o in d.offsets] == [0, 1, 2, 3, 4]


@virtual_time
async def test_max_tokens_counts_what_was_sent_before() -> None:
    async with dying("abcdef", 3) as cluster:
        deltas, _ = await ask(cluster.conductor, max_tokens=5)
        assert (text_of(deltas), reason_of(deltas)) == ("abcde", ["length"])


@virtual_time
@pytest.mark.parametrize(("max_tokens", "reason"), [(20, "stop"), (6, "length")])
async def test_an_answer_that_lacks_only_the_last_word_is_complete(
    max_tokens: int, reason: str
) -> None:
    def no_last_word(sender: str, receiver: str, message: object) -> Fault:
        ending = isinstance(message, StepReport) and any(o.finish for o in message.outputs)
        return Fault(lose=ending and sender.startswith("decode"))

    async with fake_cluster(say("abcdef"), decode=1) as cluster:
        cluster.network.plan.on_message = no_last_word  # type: ignore[method-assign]
        deltas, _ = await ask(cluster.conductor, max_tokens=max_tokens)
        assert (text_of(deltas), reason_of(deltas)) == ("abcdef", [reason])
        assert not resumed_tasks(cluster)
        await cluster.check_nothing_left()


@virtual_time
async def test_a_stop_string_found_in_the_last_words_of_an_attempt_ends_the_answer() -> None:
    script = Script((*b"one STOP", EOS), error_at=8, error=FAILING)
    async with fake_cluster(lambda task: script, prefill=0) as cluster:
        deltas, _ = await ask(cluster.conductor, stop=("STOP",), max_tokens=50)
        assert (text_of(deltas), reason_of(deltas)) == ("one ", ["stop"])
        assert not resumed_tasks(cluster)
        await cluster.check_nothing_left()


@virtual_time
async def test_tokens_that_came_too_early_are_made_again() -> None:
    def late(sender: str, receiver: str, message: object) -> Fault:
        slow = sender.startswith("prefill") and isinstance(message, StepReport)
        return Fault(delay_s=3.0 if slow else 0.0)

    async with fake_cluster(say("abcdef", hang_at=3), decode=2) as cluster:
        cluster.network.plan.on_message = late  # type: ignore[method-assign]
        task = asyncio.create_task(ask(cluster.conductor))
        await asyncio.sleep(1.0)  # tokens 1 and 2 are there, token 0 is under way
        cluster.network.plan.on_message = lambda *_: Fault()  # type: ignore[method-assign]
        busy = next(w for w in cluster.workers.values() if w.info.role is Role.DECODE and w.live)
        for worker in cluster.workers.values():
            worker.script = say("abcdef")
        cluster.network.kill(busy.info.address)
        deltas, _ = await task
        assert tokens_of(deltas) == [*b"abcdef", EOS]
        assert {task.output for task in resumed_tasks(cluster)} == {()}
        await cluster.check_nothing_left()


@virtual_time
@pytest.mark.parametrize("phase", ["queued", "prefilling", "transferring", "decoding"])
async def test_a_decode_worker_may_die_in_every_phase(phase: str) -> None:
    at, slow = (3, 0.0) if phase == "decoding" else (0, 0.0)
    script = only_first(Script((*b"abcdef", EOS), hang_at=at, prefill_s=slow))
    async with fake_cluster(script, prefill=1, decode=2) as cluster:
        prefill = cluster.workers["prefill-0"]
        if phase == "queued":  # behind another one
            blocker = asyncio.create_task(ask(cluster.conductor, "first"))
            await wait_for(lambda: len(prefill.live) == 1)
        if phase == "transferring":
            prefill.script = say("abcdef")
        before = set(cluster.workers["decode-0"].tasks), set(cluster.workers["decode-1"].tasks)
        asking = asyncio.create_task(ask(cluster.conductor, "second"))
        decoders = [cluster.workers["decode-0"], cluster.workers["decode-1"]]
        await wait_for(lambda: sum(len(w.tasks) for w in decoders) > sum(map(len, before)))
        await asyncio.sleep(0.5)
        mine = next(w for w, old in zip(decoders, before, strict=True) if set(w.tasks) - old)
        prefill.script = only_first(Script((*b"abcdef", EOS)))
        cluster.network.kill(mine.info.address)
        deltas, _ = await asking
        assert tokens_of(deltas) == [*b"abcdef", EOS]
        if phase == "queued":
            blocker.cancel()
            await asyncio.gather(blocker, return_exceptions=True)
        await cluster.check_nothing_left()


@virtual_time
async def test_the_cached_tokens_are_those_of_the_first_attempt() -> None:
    def script(task: GenerationTask) -> Script:
        first = task.attempt.number == 0
        return Script(
            (*b"abcdef", EOS), hang_at=3 if first else None, cached_tokens=2 if first else 5
        )

    async with dying("abcdef", 3) as cluster:
        for worker in cluster.workers.values():
            worker.script = script
        _, usage = await ask(cluster.conductor, max_tokens=20)
        assert usage.cached_tokens == 2


@virtual_time
async def test_a_resumed_attempt_is_routed_by_its_whole_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = bytes(range(97, 97 + 24))
    asked: list[RouteRequest] = []
    monkeypatch.setattr(attempts, "route", lambda *args: (asked.append(args[0]), route(*args))[1])
    async with dying(text, 20) as cluster:
        prompt = "p" * (2 * BLOCK_SIZE - 4)
        for worker in cluster.workers.values():  # somebody caches: keys are asked for
            await worker.tell(KvSnapshot(1, Tier.GPU, bytes(16), first=True, last=True))
        await settle()
        seen: list[bytes] = []
        matches = cluster.conductor.fleet.prefix_map.matches
        cluster.conductor.fleet.prefix_map.matches = (  # type: ignore[method-assign]
            lambda keys: (seen.append(keys), matches(keys))[1]  # type: ignore[func-returns-value]
        )
        deltas, _ = await ask(cluster.conductor, prompt, max_tokens=40)
        assert tokens_of(deltas) == [*text, EOS]
        first, resumed = seen
        assert resumed.startswith(first)
        assert (len(first) // 16, len(resumed) // 16) == (1, 3)  # 28 tokens, then 48
        assert [(len(a.prompt), a.max_tokens) for a in asked] == [(28, 40), (48, 20)]


@virtual_time
async def test_an_answer_waits_for_a_worker_to_come_back() -> None:
    async with fake_cluster(say("abcdef", hang_at=3), prefill=0) as cluster:
        asking = asyncio.create_task(ask(cluster.conductor))
        await wait_for(lambda: bool(cluster.workers["decode-0"].live))
        cluster.network.kill("decode-0:1")
        await asyncio.sleep(20)
        assert not asking.done()
        await cluster.add(Role.DECODE, "decode-0", say("abcdef"), incarnation="2", address="d:2")
        deltas, _ = await asking
        assert tokens_of(deltas) == [*b"abcdef", EOS]
        assert asyncio.get_running_loop().time() < 21
        await cluster.check_nothing_left()


@virtual_time
async def test_looking_for_a_worker_again_and_again_piles_nothing_up() -> None:
    async with fake_cluster(say("abcdef", hang_at=3), prefill=0) as cluster:
        asking = asyncio.create_task(ask(cluster.conductor))
        await wait_for(lambda: bool(cluster.workers["decode-0"].live))
        cluster.network.kill("decode-0:1")
        await asyncio.sleep(20)  # 200 looks
        (serving,) = cluster.conductor._servings.values()
        assert len(serving._timers) <= 2  # the deadline, and the next look
        with pytest.raises(WorkerLost, match="decode-0"):
            await asking
        await cluster.check_nothing_left()


@virtual_time
async def test_no_worker_comes_back() -> None:
    async with fake_cluster(say("abcdef", hang_at=3), prefill=0) as cluster:
        asking = asyncio.create_task(ask(cluster.conductor))
        await wait_for(lambda: bool(cluster.workers["decode-0"].live))
        cluster.network.kill("decode-0:1")
        with pytest.raises(WorkerLost, match="decode-0"):
            await asking
        assert asyncio.get_running_loop().time() == pytest.approx(30, abs=1)
        with pytest.raises(DeadlineExceeded):
            await ask(cluster.conductor, timeout_s=4)
        with pytest.raises(NoWorker, match="decode-0 is suspect"):  # it might be restarted
            await ask(cluster.conductor)
        await cluster.check_nothing_left()


@virtual_time
async def test_what_kills_two_workers_is_stopped_and_the_others_go_on() -> None:
    fatal = "die"

    def script(task: GenerationTask) -> Script:
        poison = bytes(task.prompt) == fatal.encode()
        return Script((*b"ok", EOS), hang_at=0 if poison else None)

    async with fake_cluster(script, prefill=3, decode=1) as cluster:

        async def die_of_it() -> None:
            for _ in range(2):
                busy: list[FakeWorker] = []
                while not busy:
                    await asyncio.sleep(0.01)
                    busy = [w for w in cluster.workers.values() if w.info.role is Role.PREFILL]
                    busy = [w for w in busy if w.live]
                cluster.network.kill(busy[0].info.address)
                busy[0].live.clear()

        dying = asyncio.create_task(die_of_it())
        with pytest.raises(
            PoisonRequest, match=r"workers died one after the other .* \(prefill-., prefill-.\)"
        ):
            await ask(cluster.conductor, fatal)
        await dying
        assert cluster.conductor.metrics.poison._value.get() == 1
        deltas, _ = await ask(cluster.conductor, "fine")
        assert text_of(deltas) == "ok"
        await cluster.check_nothing_left()


@virtual_time
async def test_a_spent_budget_is_overload() -> None:
    retries = RetryOptions(burst=1, per_s=0.0, share=0.0)
    policy = Policy(lease_ttl_s=1e6, retries=retries)
    script = only_first(Script((*b"abc", EOS), error_at=2, error=FAILING))
    async with fake_cluster(script, policy=policy) as cluster:
        deltas, _ = await ask(cluster.conductor)
        assert text_of(deltas) == "abc"
        with pytest.raises(Overloaded, match="too late"):
            await ask(cluster.conductor)
        refusals = cluster.conductor.metrics.retry_refusals
        assert refusals["budget"] == 1
        await cluster.check_nothing_left()


@virtual_time
async def test_pauses_grow_between_attempts_in_virtual_time() -> None:
    started: list[float] = []

    def script(task: GenerationTask) -> Script:
        started.append(asyncio.get_running_loop().time())
        return Script((*b"abc", EOS), error_at=0, error=FAILING)

    async with fake_cluster(script, prefill=0) as cluster:
        with pytest.raises(Exception, match="too late"):
            await ask(cluster.conductor)
        gaps = [later - sooner for sooner, later in pairwise(started)]
        assert gaps[0] == 0
        for gap, limit in zip(gaps[1:], [0.1, 0.2, 0.4, 0.8], strict=True):
            assert limit / 2 <= gap <= limit
        await cluster.check_nothing_left()


@virtual_time
async def test_closing_while_an_attempt_is_awaited_leaves_nothing() -> None:
    async with fake_cluster(say("abc", error_at=2, error=FAILING)) as cluster:
        request = await cluster.conductor.prepare(Ask("tiny", ("x",), Options()), "test")
        async with aclosing(cluster.conductor.generate(request)) as results:
            async for _ in results:
                break
        asking = asyncio.create_task(ask(cluster.conductor))
        await asyncio.sleep(0.05)  # in a pause
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await cluster.check_nothing_left()


@virtual_time
async def test_the_trace_tells_why_each_attempt_ended() -> None:
    async with dying("abcdef", 3) as cluster:
        await ask(cluster.conductor, max_tokens=20)
        timeline = next(iter(cluster.conductor.traces._timelines.values()))
        first, second = timeline_json(timeline, now_s=0.0)["attempts"]
        assert first["ended"].startswith("worker_lost: worker decode-")
        assert (first["resumed_at"], second["resumed_at"]) == (0, 3)
        assert second["ended"] == "complete"


@virtual_time
async def test_a_length_that_the_worker_reports_is_believed() -> None:
    script = Script((*b"abc",), FinishReason.LENGTH)
    async with fake_cluster(lambda task: script, prefill=0) as cluster:
        deltas, _ = await ask(cluster.conductor, max_tokens=20)
        assert (text_of(deltas), reason_of(deltas)) == ("abc", ["length"])
