"""Runs one load against one server and says what came of it, as plain figures."""

from __future__ import annotations

import asyncio
import itertools
import resource
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from baton.bench.stats import LoadSummary, Outcome, Slo, distribution, summarize
from bench.client import Ask, Exchange, Target, complete
from bench.workloads import Arrivals, Interference, Load, Sweep, Waves

Figures = dict[str, float]  # seconds, tokens per second, counts; the name says which
Errors = tuple[tuple[str, int], ...]  # message and how often

CALIBRATION_CONCURRENCY = 16
RATE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Measured:
    figures: Figures
    errors: Errors = ()


@dataclass(frozen=True, slots=True)
class Driver:
    """Sends loads to `target`. `timeout_s` bounds each request."""

    target: Target
    timeout_s: float = 600.0
    rate_per_s: float | None = field(default=None)  # of open loops

    async def run(self, load: Load) -> Measured:
        """Figures of the load, with what the client itself took."""
        before, started = _client_cpu_s(), asyncio.get_running_loop().time()
        measured = await self._run(load)
        cpu_s = _client_cpu_s() - before
        figures = dict(measured.figures)
        figures["wall_s"] = asyncio.get_running_loop().time() - started
        figures["client_cpu_s"] = cpu_s
        if tokens := figures.get("output_tokens"):
            figures["client_us_per_token"] = cpu_s / tokens * 1e6
        return Measured(figures, measured.errors)

    def _run(self, load: Load) -> Awaitable[Measured]:
        match load:
            case Waves():
                return self._waves(load)
            case Sweep():
                return self._sweep(load)
            case Arrivals():
                return self._arrivals(load)
            case Interference():
                return self._interference(load)

    async def _waves(self, load: Waves) -> Measured:
        origin = asyncio.get_running_loop().time()
        outcomes: list[Outcome] = []
        for wave in load.waves:
            outcomes += await self.closed_loop(wave, load.concurrency, origin)
        return _measured(summarize(outcomes, Slo()), outcomes)

    async def _sweep(self, load: Sweep) -> Measured:
        """The figures of the concurrency with the best throughput, and every throughput."""
        steps: list[tuple[float, int, Measured]] = []
        for concurrency, asks in load.steps:
            origin = asyncio.get_running_loop().time()
            outcomes = await self.closed_loop(asks, concurrency, origin)
            measured = _measured(summarize(outcomes, Slo()), outcomes)
            steps.append((measured.figures["output_tokens_per_s"], concurrency, measured))
        _, concurrency, best = max(steps, key=lambda step: step[0])
        figures = dict(best.figures)
        figures["best_concurrency"] = concurrency
        for rate, at, _ in steps:
            figures[f"output_tokens_per_s_at_{at}"] = rate
        figures["output_tokens"] = sum(step.figures["output_tokens"] for _, _, step in steps)
        figures["failed"] = sum(step.figures["failed"] for _, _, step in steps)
        return Measured(figures, tuple(error for _, _, step in steps for error in step.errors))

    async def _arrivals(self, load: Arrivals) -> Measured:
        if self.rate_per_s is None:
            raise ValueError("an open loop needs a rate")
        clock = asyncio.get_running_loop().time
        origin = clock()
        outcomes: list[Outcome] = []

        async def one(ask: Ask, due: float) -> None:
            late_s = clock() - due
            outcomes.append(await complete(self.target, ask, origin, self.timeout_s, late_s))

        async with asyncio.TaskGroup() as group:
            for ask, at in zip(load.asks, load.at, strict=True):
                due = origin + at / self.rate_per_s
                await asyncio.sleep(max(0.0, due - clock()))
                group.create_task(one(ask, due))
        summary = summarize(outcomes, Slo())
        measured = _measured(summary, outcomes)
        measured.figures["rate_per_s"] = self.rate_per_s
        measured.figures["max_late_s"] = summary.max_late_s
        return measured

    async def _interference(self, load: Interference) -> Measured:
        clock = asyncio.get_running_loop().time
        origin = clock()
        streams = [await Exchange.start(self.target, ask) for ask in load.streams]
        try:
            async with asyncio.timeout(self.timeout_s):
                await asyncio.gather(*(stream.events(load.settle) for stream in streams))
                if any(stream.done.done() for stream in streams):
                    return Measured({"failed": 1.0}, (("a stream ended too early", 1),))
                sent = clock()
                long = await complete(self.target, load.long, origin, self.timeout_s)
                lasted = not any(stream.done.done() for stream in streams)
        finally:
            for stream in streams:
                stream.close()
        if long.timing is None or not lasted:
            message = long.error or "a stream ended before the prefill did"
            return Measured({"failed": 1.0}, ((message, 1),))
        first = origin + long.started_s + long.timing.ttft_s
        before, during = split_gaps([stream.arrivals for stream in streams], sent, first)
        figures: Figures = {"failed": 0.0, "long_ttft_s": long.timing.ttft_s}
        figures["output_tokens"] = float(sum(len(stream.arrivals) for stream in streams))
        for name, gaps in (("before", before), ("during", during)):
            samples = distribution(gaps)
            _put(figures, f"itl_{name}_p50_s", samples.p50)
            _put(figures, f"itl_{name}_p99_s", samples.p99)
            _put(figures, f"itl_{name}_max_s", samples.max)
        # Some servers send several tokens at once: rates say what gaps then do not.
        arrivals = [at for stream in streams for at in stream.arrivals]
        settled = max(stream.arrivals[0] for stream in streams)
        for name, start, end in (("before", settled, sent), ("during", sent, first)):
            figures[f"tokens_per_s_{name}"] = sum(start < at <= end for at in arrivals) / (
                end - start
            )
        return Measured(figures)

    async def closed_loop(
        self, asks: Sequence[Ask], concurrency: int, origin: float
    ) -> list[Outcome]:
        """Keep `concurrency` requests under way until all were sent."""
        outcomes: list[Outcome] = []
        waiting: Iterator[Ask] = iter(asks)

        async def user() -> None:
            for ask in waiting:  # one iterator for all users: each is taken once
                outcomes.append(await complete(self.target, ask, origin, self.timeout_s))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(asks))):
                group.create_task(user())
        return outcomes

    async def saturation_rate(self, asks: Sequence[Ask]) -> float:
        """Requests per second that the server completes of these when it is never idle.

        Raises RuntimeError when it fails some.
        """
        origin = asyncio.get_running_loop().time()
        outcomes = await self.closed_loop(asks, CALIBRATION_CONCURRENCY, origin)
        summary = summarize(outcomes, Slo())
        if summary.failed:
            raise RuntimeError(f"calibration: {summary.failed} failed: {summary.errors[0][0]}")
        return summary.request_per_s


def split_gaps(
    streams: Iterable[Sequence[float]], sent: float, first: float
) -> tuple[list[float], list[float]]:
    """Gaps between the tokens of streams: those that ended before `sent`, and those that overlap
    [sent, first]. Gaps before every stream has its first token are left out (their prefills).
    """
    arrivals = [list(stream) for stream in streams]
    settled = max(stream[0] for stream in arrivals)
    before: list[float] = []
    during: list[float] = []
    for stream in arrivals:
        for start, end in itertools.pairwise(stream):
            if start >= settled and end <= sent:
                before.append(end - start)
            elif end > sent and start < first:
                during.append(end - start)
    return before, during


def _measured(summary: LoadSummary, outcomes: Sequence[Outcome]) -> Measured:
    events = sum(len(o.timing.arrivals_s) for o in outcomes if o.timing is not None)
    figures: Figures = {
        "requests": float(summary.requests),
        "failed": float(summary.failed),
        "duration_s": summary.duration_s,
        "output_tokens": float(summary.output_tokens),
        "output_tokens_per_s": summary.output_tokens_per_s,
        "requests_per_s": summary.request_per_s,
        "cached_tokens": float(summary.cached_tokens),
    }
    if events:
        figures["tokens_per_event"] = summary.output_tokens / events
    for name, samples in (
        ("ttft", summary.ttft_s),
        ("tpot", summary.tpot_s),
        ("itl", summary.itl_s),
        ("latency", summary.latency_s),
    ):
        _put(figures, f"{name}_p50_s", samples.p50)
        _put(figures, f"{name}_p99_s", samples.p99)
    return Measured(figures, summary.errors)


def _put(figures: Figures, name: str, value: float | None) -> None:
    if value is not None:
        figures[name] = value


def _client_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
