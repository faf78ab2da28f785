"""`baton bench serve`: a load against a running cluster, as its clients see it."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from baton import __version__
from baton.bench.load import (
    PromptShape,
    closed_loop,
    make_prompts,
    open_loop,
    poisson_arrivals,
)
from baton.bench.stats import Distribution, LoadSummary, Slo, summarize
from baton.client.http import Client
from baton.errors import ConfigError

OnProgress = Callable[[int, int], None]  # requests that ended, requests of the run


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load. With `rate_per_s` open loop (Poisson arrivals), else closed loop."""

    shape: PromptShape
    requests: int
    concurrency: int = 8
    rate_per_s: float | None = None
    warmup: int = 4  # requests before the measured ones, of the same shape and other tokens
    slo: Slo = field(default_factory=Slo)


async def measure(
    url: str, plan: LoadPlan, on_progress: OnProgress, api_key: str = ""
) -> LoadSummary:
    """Run the load against the cluster at `url`. Raises ConfigError when every request failed."""
    prompts = make_prompts(plan.shape, plan.warmup + plan.requests)
    warmup, measured = prompts[: plan.warmup], prompts[plan.warmup :]
    ended = 0

    def count(_: object) -> None:
        nonlocal ended
        ended += 1
        on_progress(ended, plan.requests)

    async with Client(url, timeout_s=600.0, api_key=api_key) as client:
        await client.default_model()
        await closed_loop(client, warmup, plan.concurrency, lambda _: None)
        on_progress(0, plan.requests)
        if plan.rate_per_s is None:
            outcomes = await closed_loop(client, measured, plan.concurrency, count)
        else:
            arrivals = poisson_arrivals(plan.rate_per_s, plan.shape.seed)
            outcomes = await open_loop(client, measured, arrivals, count)
    summary = summarize(outcomes, plan.slo)
    if summary.failed == summary.requests:
        raise ConfigError(f"every request failed, mostly with: {summary.errors[0][0]}")
    return summary


def as_json(plan: LoadPlan, runs: dict[str, LoadSummary], argv: Sequence[str]) -> dict[str, Any]:
    """The whole result with what is needed to repeat it."""
    return {
        "benchmark": "serve",
        "command": shlex.join(["baton", *argv]),
        "baton": __version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "os": platform.system(),
            "arch": platform.machine(),
            "cpus": len(os.sched_getaffinity(0)),
            "load_1min": os.getloadavg()[0],
        },
        "plan": asdict(plan),
        "runs": {name: asdict(summary) for name, summary in runs.items()},
    }


def rows(summary: LoadSummary) -> list[tuple[str, str]]:
    """Name and value of each figure, for people."""
    lines = [
        ("requests", f"{summary.requests} ({summary.failed} failed)"),
        ("duration", f"{summary.duration_s:.2f} s"),
        ("requests/s", f"{summary.request_per_s:.2f}"),
        ("output tokens/s", f"{summary.output_tokens_per_s:.1f}"),
        ("cached prompt tokens", f"{summary.cached_tokens} of {summary.prompt_tokens}"),
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
    lines += [(f"error × {count}", message) for message, count in summary.errors[:3]]
    return lines


def _milliseconds(samples: Distribution) -> str:
    values = (samples.p50, samples.p90, samples.p99)
    return " / ".join("-" if v is None else f"{v * 1e3:.1f}" for v in values) + " ms"
