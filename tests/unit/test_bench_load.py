"""Load generation and its statistics, in virtual terms: a client that answers as it is told."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable

import httpx
import numpy as np
import pytest

from baton.bench import serve
from baton.bench.ideal import InfiniteCache
from baton.bench.load import Load, poisson_arrivals
from baton.bench.serve import LoadPlan
from baton.bench.sessions import Session, Shape, TraceScale, Turn, make_sessions, trace_sessions
from baton.bench.stats import Outcome, Slo, distribution, percentile, summarize
from baton.bench.timelines import Attributed, Balance, ttft_parts
from baton.bench.trace import TraceRequest
from baton.client.http import Client, Usage
from baton.client.timing import Timing
from baton.errors import ConfigError
from tests.unit.fake_cluster import EVENTS, sse

SHAPE = Shape(input_tokens=10, output_tokens=4, vocab_size=50, seed=3)
CLUSTER = {"workers": [{"name": f"{role}-0", "role": role} for role in ("prefill", "decode")]}
SPANS = [
    ("conductor", "first_token", 1.0, 2.0),
    ("prefill-0", "queue", 1.1, 1.3),
    ("prefill-0", "prefill", 1.3, 1.9),
    ("prefill-0", "handoff", 1.9, 2.1),
    ("decode-0", "queue", 1.0, 1.1),
]
TRACE = {
    "attempts": [{"prefill": "prefill-0", "decode": "decode-0"}],
    "spans": [
        {"source": source, "name": name, "start_s": start, "end_s": end}
        for source, name, start, end in SPANS
    ],
}


def fake_client(on_post: Callable[[httpx.Request], Awaitable[httpx.Response]]) -> Client:
    async def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return await on_post(request)
        if request.url.path.startswith("/trace/"):
            return httpx.Response(200, json=TRACE)
        return httpx.Response(200, json={"data": [{"id": "fake"}]} | CLUSTER)

    return Client("http://cluster", transport=httpx.MockTransport(handle))


def load_of(client: Client, ended: list[Outcome] | None = None) -> Load:
    return Load(client, InfiniteCache(4), [].append if ended is None else ended.append)


def prompt_of(request: httpx.Request) -> tuple[int, ...]:
    return tuple(json.loads(request.content)["prompt"])


def answered(*ids: int) -> httpx.Response:
    choice = {"index": 0, "text": "x", "finish_reason": "length", "token_ids": list(ids)}
    return httpx.Response(200, content=sse([{"id": "r", "choices": [choice]}, EVENTS[-1]]))


def test_sessions_follow_from_the_seed() -> None:
    sessions = make_sessions(SHAPE, 5)
    assert sessions == make_sessions(SHAPE, 5)
    turns = [session.turns[0] for session in sessions]
    assert len({turn.tokens for turn in turns}) == 5
    assert all(len(turn.tokens) == 10 and turn.max_tokens == 4 for turn in turns)
    assert all(0 <= token < 50 for turn in turns for token in turn.tokens)


def test_sessions_share_prefixes_by_groups_and_vary_in_length() -> None:
    shape = Shape(100, 20, 50, shared_prefix=7, spread=0.5, seed=1, groups=2)
    turns = [session.turns[0] for session in make_sessions(shape, 40)]
    assert [turn.tokens[:7] for turn in turns[2:]] == [turn.tokens[:7] for turn in turns[:-2]]
    assert turns[0].tokens[:7] != turns[1].tokens[:7]
    lengths = {len(turn.tokens) - 7 for turn in turns}
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(lengths) > 10
    assert all(10 <= turn.max_tokens <= 30 for turn in turns)


def test_conversations_have_turns_up_to_the_number_of_requests() -> None:
    sessions = make_sessions(Shape(10, 4, 50, shared_prefix=6, turns=3), 8)
    assert [len(session.turns) for session in sessions] == [3, 3, 2]
    assert [len(turn.tokens) for turn in sessions[0].turns] == [16, 10, 10]


def test_a_trace_shares_what_the_recorded_prompts_shared() -> None:
    recorded = [
        TraceRequest(10.0, 1100, 100, (0, 1, 2)),
        TraceRequest(11.0, 1300, 8, (0, 1, 3)),
        TraceRequest(11.5, 100, 8),
    ]
    scale = TraceScale(tokens=1 / 16, time=0.5, max_input=1000, max_output=5)
    sessions = trace_sessions(recorded, scale, 1000, seed=1)
    assert sessions == trace_sessions(recorded, scale, 1000, seed=1)
    assert [session.at_s for session in sessions] == [0.0, 0.5, 0.75]
    first, second, third = (session.turns[0].tokens for session in sessions)
    assert (len(first), len(second), len(third)) == (69, 81, 6)
    assert first[:64] == second[:64]
    assert first[64:] != second[64:69]
    assert [session.turns[0].max_tokens for session in sessions] == [5, 1, 1]


def test_the_ideal_cache_knows_prompts_and_answers_by_full_blocks() -> None:
    cache = InfiniteCache(4)
    assert cache.expect([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert cache.expect([1, 2, 3, 4, 5, 6, 7, 8]) == 4  # the last token is always computed
    assert cache.expect([1, 2, 3, 4, 9]) == 4
    assert cache.expect([2, 2, 3, 4, 5, 6, 7, 8]) == 0
    cache.learn([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])  # the KV of the 12th is not computed
    assert cache.expect([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]) == 8


def test_poisson_arrivals_have_the_rate() -> None:
    times = list(itertools.islice(poisson_arrivals(20.0, seed=5), 4000))
    assert times[0] == 0
    assert times == sorted(times)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.1)  # exponential: deviation equals mean
    assert times == list(itertools.islice(poisson_arrivals(20.0, seed=5), 4000))


async def test_closed_loop_keeps_the_concurrency() -> None:
    busy = most = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0)
        busy -= 1
        return httpx.Response(200, content=sse(EVENTS))

    async with fake_client(answer) as client:
        ended: list[Outcome] = []
        outcomes = await load_of(client, ended).closed_loop(make_sessions(SHAPE, 12), 3)
    assert most == 3
    assert outcomes == ended
    assert len(outcomes) == 12
    assert all(outcome.timing and outcome.late_s == 0 for outcome in outcomes)


async def test_open_loop_does_not_wait_for_answers() -> None:
    gate = asyncio.Event()
    asked = 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked == 5:
            gate.set()
        await gate.wait()
        return httpx.Response(200, content=sse(EVENTS))

    async with fake_client(answer) as client, asyncio.timeout(20):
        arrivals = iter([0.0, 0.001, 0.002, 0.003, 0.004])
        outcomes = await load_of(client).open_loop(make_sessions(SHAPE, 5), arrivals)
    assert len(outcomes) == 5
    assert all(outcome.late_s >= 0 for outcome in outcomes)


async def test_a_turn_repeats_all_that_was_said_and_sessions_take_turns() -> None:
    prompts: list[tuple[int, ...]] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        prompts.append(prompt_of(request))
        return answered(90 + len(prompts))

    a = Session((Turn((1, 2, 3, 4), 1), Turn((5,), 1)))
    b = Session((Turn((6, 7, 8, 9), 1), Turn((10,), 1)))
    async with fake_client(answer) as client:
        outcomes = await load_of(client).closed_loop([a, b], concurrency=1, alive=2)
    assert prompts == [(1, 2, 3, 4), (6, 7, 8, 9), (1, 2, 3, 4, 91, 5), (6, 7, 8, 9, 92, 10)]
    assert [outcome.ideal_cached_tokens for outcome in outcomes] == [0, 0, 4, 4]


async def test_one_at_a_time_finishes_a_session_before_the_next() -> None:
    prompts: list[tuple[int, ...]] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        prompts.append(prompt_of(request))
        return answered(0)

    sessions = [Session((Turn((n,), 1), Turn((n,), 1))) for n in (1, 2)]
    async with fake_client(answer) as client:
        await load_of(client).closed_loop(sessions, concurrency=1)
    assert prompts == [(1,), (1, 0, 1), (2,), (2, 0, 2)]


def test_balance_of_loads() -> None:
    assert Balance({"a": 30, "b": 10}, {}).max_to_mean == pytest.approx(1.5)
    assert Balance({"a": 0, "b": 0}, {}).max_to_mean == 1.0


def test_stages_of_a_ttft() -> None:
    fetch = {"source": "prefill-0", "name": "fetch", "start_s": 1.3, "end_s": 1.4}
    spans = [fetch if span["name"] == "queue" else span for span in TRACE["spans"]]
    assert ttft_parts(TRACE | {"spans": spans}) == {}  # not all is known
    parts = ttft_parts(TRACE | {"spans": [*TRACE["spans"], fetch]})
    assert list(parts) == ["route", "queue", "fetch", "prefill", "reply"]
    assert list(parts.values()) == pytest.approx([0.1, 0.2, 0.1, 0.6, 0.1])
    assert ttft_parts(TRACE | {"attempts": TRACE["attempts"] * 2}) == {}


def test_shares_of_ttft_that_have_a_stage() -> None:
    shares = [None, *(n / 200 for n in range(200, 0, -1))]
    told = Attributed.of([TRACE | {"ttft_attributed": share} for share in shares])
    assert told == Attributed(200, 0.005, 0.015, 0.505)
    assert Attributed.of([TRACE]) is None


async def test_failures_are_counted_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()

    async def answer(request: httpx.Request) -> httpx.Response:
        if next(numbers) % 2:
            return httpx.Response(429, json={"error": {"message": "full", "code": "overloaded"}})
        return httpx.Response(200, content=sse(EVENTS))

    async with fake_client(answer) as client:
        outcomes = await load_of(client).closed_loop(make_sessions(SHAPE, 6), 1)
    summary = summarize(outcomes, Slo())
    assert (summary.requests, summary.failed) == (6, 3)
    assert summary.errors == (("full", 3),)
    assert summary.output_tokens == 6


@pytest.mark.parametrize("rate", [None, 1000.0])
async def test_measure_warms_up_and_reports_progress(
    monkeypatch: pytest.MonkeyPatch, rate: float | None
) -> None:
    prompts = []

    async def answer(request: httpx.Request) -> httpx.Response:
        prompts.append(prompt_of(request))
        return httpx.Response(200, content=sse(EVENTS))

    monkeypatch.setattr(serve, "Client", lambda url, **_: fake_client(answer))
    progress: list[tuple[int, int]] = []
    plan = LoadPlan(SHAPE, requests=5, concurrency=2, rate_per_s=rate, warmup=2, slo=Slo(60.0))
    run = await serve.measure("x", plan, lambda *step: progress.append(step))
    summary = run.load
    assert run.timelines is not None
    assert run.timelines.balance == Balance({"prefill-0": 10}, {"prefill-0": 5})
    assert run.timelines.ttft_parts["queue"] == pytest.approx(0.2)
    assert len(set(prompts)) == 7  # measured prompts were not warmed up
    assert summary.requests == summary.good == 5
    assert progress == [(n, 5) for n in range(6)]
    result = serve.as_json(plan, {"run": run}, ["bench", "serve", "--rate", "1 2"])
    assert result["command"] == "baton bench serve --rate '1 2'"
    assert result["runs"]["run"]["requests"] == 5
    assert result["runs"]["run"]["balance"]["requests"] == {"prefill-0": 5}
    assert dict(serve.rows(run))["goodput"].endswith("(100% good)")


async def test_a_run_without_any_success_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json={"error": {"message": "nobody", "code": "no_worker"}})

    monkeypatch.setattr(serve, "Client", lambda url, **_: fake_client(refuse))
    with pytest.raises(ConfigError, match="nobody"):
        await serve.measure("x", LoadPlan(SHAPE, requests=2), lambda *_: None)


def test_percentiles_agree_with_numpy() -> None:
    samples = sorted(np.random.default_rng(1).exponential(size=137).tolist())
    for q in (0, 50, 90, 99, 100):
        assert percentile(samples, q) == pytest.approx(float(np.percentile(samples, q)))
    assert percentile([4.0], 99) == 4.0
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)
    assert distribution([]).p50 is None
    assert distribution([3.0, 1.0, 2.0]).max == 3.0


def outcome(start: float, ttft: float, gaps: tuple[float, ...]) -> Outcome:
    arrivals = tuple(itertools.accumulate((ttft, *gaps)))
    usage = Usage(10, len(arrivals), 4)
    return Outcome(start, start + arrivals[-1], Timing(arrivals, arrivals[-1], usage))


def test_a_summary_by_hand() -> None:
    outcomes = [
        outcome(0.0, 0.1, (0.02, 0.02)),  # good
        outcome(0.5, 0.4, (0.02, 0.02)),  # TTFT too long
        outcome(1.0, 0.1, (0.02, 0.20)),  # TPOT too long
        outcome(1.5, 0.1, ()),  # good: one token has no TPOT
        Outcome(1.0, 2.0, error="lost"),
    ]
    summary = summarize(outcomes, Slo(ttft_s=0.2, tpot_s=0.05))
    assert summary.duration_s == pytest.approx(2.0)
    assert (summary.requests, summary.failed, summary.good) == (5, 1, 2)
    assert summary.goodput_per_s == pytest.approx(1.0)
    assert summary.output_tokens_per_s == pytest.approx(5.0)
    assert summary.total_tokens_per_s == pytest.approx(25.0)
    assert summary.cached_tokens == 16
    assert summary.ttft_s.max == pytest.approx(0.4)
    assert summary.itl_s.max == pytest.approx(0.2)


def test_the_gap_after_the_first_token_is_what_is_not_hidden() -> None:
    outcomes = [outcome(0.0, 0.4, (0.12, 0.02, 0.02, 0.03)), outcome(0.0, 0.1, (0.01, 0.02, 0.02))]
    summary = summarize(outcomes, Slo())
    assert summary.first_gap_s.max == pytest.approx(0.1)
    assert summary.first_gap_of_ttft.max == pytest.approx(0.25)
    assert summary.first_gap_s.p50 == pytest.approx(0.05)  # never negative
    assert summarize([outcome(0.0, 0.1, (0.2,))], Slo()).first_gap_s.p50 is None


def test_a_summary_of_nothing() -> None:
    summary = summarize([], Slo())
    assert (summary.requests, summary.duration_s, summary.goodput_per_s) == (0, 0.0, 0.0)
