"""What a load run measured: percentiles, throughput, goodput. Plain numbers, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from baton.client.timing import Timing


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request of a load run. Exactly one of `timing` and `error` is set.

    `started_s` and `ended_s` are seconds since the measured part of the run began; `late_s` is how
    much later than planned the request was sent (open loop).
    """

    started_s: float
    ended_s: float
    timing: Timing | None = None
    error: str | None = None
    late_s: float = 0.0
    ideal_cached_tokens: int = 0  # what a cache without bounds would have found of the prompt


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper bounds in seconds; None = not asked for."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, timing: Timing) -> bool:
        """Whether the request is good. An answer of one token has no TPOT to miss."""
        if self.ttft_s is not None and timing.ttft_s > self.ttft_s:
            return False
        tpot_s = timing.tpot_s
        return self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of some samples, in their unit. All None when there are none."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    max: float | None


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """Latencies in seconds. Rates are over `duration_s`: first request sent to last one ended."""

    requests: int
    failed: int
    errors: tuple[tuple[str, int], ...]  # message and how often, most frequent first
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    ideal_cached_tokens: int
    output_tokens: int
    request_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    latency_s: Distribution
    first_gap_s: Distribution  # Timing.first_gap_s: the handoff as clients see it
    first_gap_of_ttft: Distribution  # the same as a share of the request's TTFT
    max_late_s: float  # a generator that falls behind measures itself
    slo: Slo
    good: int
    goodput_per_s: float  # requests per second that met every bound


def percentile(samples: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0–100) of sorted samples, interpolated linearly (Hyndman and Fan 1996,
    definition 7, as numpy's default). Raises ValueError when there are none."""
    if not samples:
        raise ValueError("a percentile needs at least one sample")
    position = (len(samples) - 1) * q / 100
    low = math.floor(position)
    high = min(low + 1, len(samples) - 1)
    return samples[low] + (samples[high] - samples[low]) * (position - low)


def distribution(samples: Sequence[float]) -> Distribution:
    if not samples:
        return Distribution(None, None, None, None, None)
    ordered = sorted(samples)
    return Distribution(
        mean=math.fsum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def summarize(outcomes: Sequence[Outcome], slo: Slo) -> LoadSummary:
    """Everything that a load run is judged by. Failed requests count, but have no latencies."""
    timings = [outcome.timing for outcome in outcomes if outcome.timing is not None]
    duration_s = _span(outcomes)
    output = sum(timing.usage.completion_tokens for timing in timings)
    prompt = sum(timing.usage.prompt_tokens for timing in timings)
    gaps = [(timing, gap) for timing in timings if (gap := timing.first_gap_s) is not None]
    good = sum(slo.met_by(timing) for timing in timings)
    return LoadSummary(
        requests=len(outcomes),
        failed=len(outcomes) - len(timings),
        errors=_count_errors(outcomes),
        duration_s=duration_s,
        prompt_tokens=prompt,
        cached_tokens=sum(timing.usage.cached_tokens for timing in timings),
        ideal_cached_tokens=sum(outcome.ideal_cached_tokens for outcome in outcomes),
        output_tokens=output,
        request_per_s=_rate(len(timings), duration_s),
        output_tokens_per_s=_rate(output, duration_s),
        total_tokens_per_s=_rate(output + prompt, duration_s),
        ttft_s=distribution([timing.ttft_s for timing in timings]),
        tpot_s=distribution([t.tpot_s for t in timings if t.tpot_s is not None]),
        itl_s=distribution([gap for timing in timings for gap in timing.itl_s]),
        latency_s=distribution([timing.end_s for timing in timings]),
        first_gap_s=distribution([gap for _, gap in gaps]),
        first_gap_of_ttft=distribution([gap / t.ttft_s for t, gap in gaps if t.ttft_s > 0]),
        max_late_s=max((outcome.late_s for outcome in outcomes), default=0.0),
        slo=slo,
        good=good,
        goodput_per_s=_rate(good, duration_s),
    )


def _span(outcomes: Sequence[Outcome]) -> float:
    if not outcomes:
        return 0.0
    first = min(outcome.started_s for outcome in outcomes)
    return max(outcome.ended_s for outcome in outcomes) - first


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _count_errors(outcomes: Sequence[Outcome]) -> tuple[tuple[str, int], ...]:
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            counts[outcome.error] = counts.get(outcome.error, 0) + 1
    return tuple(sorted(counts.items(), key=lambda item: -item[1]))
