"""`baton bench serve`: a load against a running cluster, as its clients see it."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from baton.bench.ideal import InfiniteCache
from baton.bench.load import Load, poisson_arrivals
from baton.bench.origin import origin
from baton.bench.sessions import Session, Shape, TraceScale, make_sessions, trace_sessions
from baton.bench.stats import Distribution, LoadSummary, Slo, summarize
from baton.bench.timelines import Timelines, read_timelines
from baton.bench.trace import read_trace
from baton.client.http import Client
from baton.errors import ConfigError

OnProgress = Callable[[int, int], None]  # requests that ended, requests of the run


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load: `requests` of a shape, or of a recorded trace (with the shape's vocabulary and
    seed). Open loop with `rate_per_s` (Poisson arrivals) and for traces, else closed loop."""

    shape: Shape
    requests: int
    concurrency: int = 8
    rate_per_s: float | None = None
    warmup: int = 4  # requests before the measured ones, of the same lengths and other tokens
    slo: Slo = field(default_factory=Slo)
    alive: int = 0  # sessions that take turns in a closed loop; 0: as many as are under way
    trace: str = ""  # file
    scale: TraceScale = field(default_factory=TraceScale)

    def sessions(self) -> list[Session]:
        """Raises ConfigError when the trace cannot be read."""
        if not self.trace:
            return make_sessions(self.shape, self.requests)
        recorded = read_trace(Path(self.trace))[: self.requests]
        return trace_sessions(recorded, self.scale, self.shape.vocab_size, self.shape.seed)


@dataclass(frozen=True, slots=True)
class Run:
    """What one cluster made of a load."""

    load: LoadSummary
    timelines: Timelines | None  # None when the cluster no longer knew its requests' traces


async def measure(
    url: str,
    plan: LoadPlan,
    on_progress: OnProgress,
    api_key: str = "",
    tls: ssl.SSLContext | None = None,
) -> Run:
    """Run the load against the cluster at `url`; of `api_key` and `tls`, see Client. Raises
    ConfigError when every request failed."""
    sessions = plan.sessions()
    total = sum(len(session.turns) for session in sessions)
    other = replace(plan.shape, seed=plan.shape.seed + 1, groups=1)
    ended = 0

    def count(_: object) -> None:
        nonlocal ended
        ended += 1
        on_progress(ended, total)

    async with Client(url, timeout_s=600.0, api_key=api_key, tls=tls) as client:
        await client.default_model()
        block_size = await _block_size(client)
        warmup = Load(client, InfiniteCache(block_size), lambda _: None)
        await warmup.closed_loop(make_sessions(other, plan.warmup), plan.concurrency)
        on_progress(0, total)
        load = Load(client, InfiniteCache(block_size), count)
        arrivals = _arrivals(plan, sessions)
        if arrivals is None:
            outcomes = await load.closed_loop(sessions, plan.concurrency, plan.alive)
        else:
            outcomes = await load.open_loop(sessions, arrivals)
        summary = summarize(outcomes, plan.slo)
        if summary.failed == summary.requests:
            raise ConfigError(f"every request failed, mostly with: {summary.errors[0][0]}")
        return Run(summary, await read_timelines(client, outcomes))


def _arrivals(plan: LoadPlan, sessions: Sequence[Session]) -> Iterator[float] | None:
    if plan.rate_per_s is not None:
        return poisson_arrivals(plan.rate_per_s, plan.shape.seed)
    times = [session.at_s for session in sessions if session.at_s is not None]
    return iter(times) if times else None


async def _block_size(client: Client) -> int:
    """Tokens of a KV block there; 32 when the cluster does not say."""
    workers = (await client.cluster()).get("workers") or [{}]
    return int(workers[0].get("block_size") or 32)


def as_json(plan: LoadPlan, runs: Mapping[str, Run], argv: Sequence[str]) -> dict[str, Any]:
    """The whole result with what is needed to repeat it."""
    return {
        **origin("serve", "baton", *argv),
        "plan": asdict(plan),
        "runs": {name: asdict(run.load) | _timelines_json(run) for name, run in runs.items()},
    }


def _timelines_json(run: Run) -> dict[str, Any]:
    known = {} if run.timelines is None else asdict(run.timelines)
    names = {"balance": "balance", "ttft_parts": "ttft_parts", "attributed": "ttft_attributed"}
    return {told: known.get(name) for name, told in names.items()}


def rows(run: Run) -> list[tuple[str, str]]:
    """Name and value of each figure, for people."""
    summary = run.load
    lines = [
        ("requests", f"{summary.requests} ({summary.failed} failed)"),
        ("duration", f"{summary.duration_s:.2f} s"),
        ("requests/s", f"{summary.request_per_s:.2f}"),
        ("output tokens/s", f"{summary.output_tokens_per_s:.1f}"),
        ("cached prompt tokens", f"{summary.cached_tokens} of {summary.prompt_tokens}"),
        ("hit rate, of an infinite cache", _hit_rate(summary)),
        ("TTFT mean", _milliseconds(summary.ttft_s, mean=True)),
        ("TTFT p50 / p90 / p99", _milliseconds(summary.ttft_s)),
        ("TPOT p50 / p90 / p99", _milliseconds(summary.tpot_s)),
        ("ITL p50 / p90 / p99", _milliseconds(summary.itl_s)),
        ("latency p50 / p90 / p99", _milliseconds(summary.latency_s)),
    ]
    share = summary.first_gap_of_ttft.p50
    if share is not None:
        lines.append(("extra gap after 1st token", _milliseconds(summary.first_gap_s)))
        lines.append(("  as a share of TTFT, p50", f"{share:.1%}"))
    if summary.slo != Slo():
        good = f"{summary.good / summary.requests:.0%} good"
        lines.append(("goodput", f"{summary.goodput_per_s:.2f} requests/s ({good})"))
    if run.timelines is not None:
        parts = run.timelines.ttft_parts
        if parts:
            times = " / ".join(f"{seconds * 1e3:.1f}" for seconds in parts.values())
            lines.append((f"TTFT mean: {' / '.join(parts)}", f"{times} ms"))
        if (told := run.timelines.attributed) is not None:
            shares = f"{told.p50:.1%} / {told.p1:.1%} / {told.lowest:.1%}"
            lines.append(("TTFT attributed, p50 / p1 / lowest", shares))
        lines.append(("prefill load, max / mean", f"{run.timelines.balance.max_to_mean:.2f}"))
    lines += [(f"error × {count}", message) for message, count in summary.errors[:3]]
    return lines


def _hit_rate(summary: LoadSummary) -> str:
    if not summary.prompt_tokens:
        return "-"
    rate = f"{summary.cached_tokens / summary.prompt_tokens:.1%}"
    if not summary.ideal_cached_tokens:
        return rate
    ideal = summary.ideal_cached_tokens / summary.prompt_tokens
    return f"{rate} of {ideal:.1%} ({summary.cached_tokens / summary.ideal_cached_tokens:.0%})"


def _milliseconds(samples: Distribution, mean: bool = False) -> str:
    values = (samples.mean,) if mean else (samples.p50, samples.p90, samples.p99)
    return " / ".join("-" if v is None else f"{v * 1e3:.1f}" for v in values) + " ms"
