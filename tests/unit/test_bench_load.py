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
from baton.bench.load import PromptShape, closed_loop, make_prompts, open_loop, poisson_arrivals
from baton.bench.serve import LoadPlan
from baton.bench.stats import Outcome, Slo, distribution, percentile, summarize
from baton.client.http import Client, Usage
from baton.client.timing import Timing
from baton.errors import ConfigError
from tests.unit.fake_cluster import EVENTS, sse

SHAPE = PromptShape(input_tokens=10, output_tokens=4, vocab_size=50, seed=3)


def fake_client(on_post: Callable[[httpx.Request], Awaitable[httpx.Response]]) -> Client:
    async def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "fake"}]})
        return await on_post(request)

    return Client("http://cluster", transport=httpx.MockTransport(handle))


def test_prompts_follow_from_the_seed() -> None:
    prompts = make_prompts(SHAPE, 5)
    assert prompts == make_prompts(SHAPE, 5)
    assert len({prompt.content for prompt in prompts}) == 5
    for prompt in prompts:
        assert isinstance(prompt.content, tuple)
        assert len(prompt.content) == 10
        assert all(isinstance(token, int) and 0 <= token < 50 for token in prompt.content)
        assert prompt.max_tokens == 4
        assert prompt.options["ignore_eos"] is True


def test_prompts_share_a_prefix_and_vary_in_length() -> None:
    shape = PromptShape(100, 20, 50, shared_prefix=7, spread=0.5, seed=1)
    prompts = make_prompts(shape, 40)
    contents = [prompt.content for prompt in prompts]
    assert len({content[:7] for content in contents}) == 1
    lengths = {len(content) - 7 for content in contents}
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(lengths) > 10
    assert all(prompt.max_tokens and 10 <= prompt.max_tokens <= 30 for prompt in prompts)


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
        outcomes = await closed_loop(client, make_prompts(SHAPE, 12), 3, ended.append)
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
        outcomes = await open_loop(client, make_prompts(SHAPE, 5), arrivals, lambda _: None)
    assert len(outcomes) == 5
    assert all(outcome.late_s >= 0 for outcome in outcomes)


async def test_failures_are_counted_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()

    async def answer(request: httpx.Request) -> httpx.Response:
        if next(numbers) % 2:
            return httpx.Response(429, json={"error": {"message": "full", "code": "overloaded"}})
        return httpx.Response(200, content=sse(EVENTS))

    async with fake_client(answer) as client:
        outcomes = await closed_loop(client, make_prompts(SHAPE, 6), 1, lambda _: None)
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
        prompts.append(tuple(json.loads(request.content)["prompt"]))
        return httpx.Response(200, content=sse(EVENTS))

    monkeypatch.setattr(serve, "Client", lambda url, timeout_s, api_key: fake_client(answer))
    progress: list[tuple[int, int]] = []
    plan = LoadPlan(SHAPE, requests=5, concurrency=2, rate_per_s=rate, warmup=2, slo=Slo(60.0))
    summary = await serve.measure("x", plan, lambda *step: progress.append(step))
    assert len(set(prompts)) == 7  # measured prompts were not warmed up
    assert summary.requests == summary.good == 5
    assert progress == [(n, 5) for n in range(6)]
    result = serve.as_json(plan, {"run": summary}, ["bench", "serve", "--rate", "1 2"])
    assert result["command"] == "baton bench serve --rate '1 2'"
    assert result["runs"]["run"]["requests"] == 5
    assert dict(serve.rows(summary))["goodput"].endswith("(100% good)")


async def test_a_run_without_any_success_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(503, json={"error": {"message": "nobody", "code": "no_worker"}})

    monkeypatch.setattr(serve, "Client", lambda url, timeout_s, api_key: fake_client(refuse))
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
