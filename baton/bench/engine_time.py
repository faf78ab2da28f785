"""Repeated timing of one call: a median with its spread. No torch."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_SAMPLE_S = 2e-3
"""Shorter calls are repeated inside of a sample, so that the clock and the loop do not show."""

_ONCE = 3.0
"""A call that takes this many times the budget is made once only."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one call, in seconds. `spread` is the interquartile range over the median."""

    median_s: float
    best_s: float
    spread: float
    samples: int

    def of_one(self, count: int) -> Timing:
        """When each call was `count` of what is wanted."""
        return replace(self, median_s=self.median_s / count, best_s=self.best_s / count)


def summarize(samples: Sequence[float]) -> Timing:
    """Raises ValueError when there is no sample."""
    median = statistics.median(samples)
    spread = 0.0
    if len(samples) > 1 and median > 0:
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        spread = (high - low) / median
    return Timing(median, min(samples), spread, len(samples))


def measure(
    call: Callable[[], object],
    budget_s: float,
    least: int = 5,
    most: int = 100,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Call once to warm up, then again and again for about `budget_s` seconds, `least` to `most`
    samples. A call that takes far longer is made once. `call` returns when its work is done."""

    def seconds(count: int) -> float:
        start = clock()
        for _ in range(count):
            call()
        return (clock() - start) / count

    first = seconds(1)
    if first > _ONCE * budget_s:
        return summarize([first])
    estimate = seconds(1)
    count = max(1, math.ceil(_SAMPLE_S / max(estimate, 1e-9)))
    wanted = round(budget_s / max(estimate * count, 1e-9))
    return summarize([seconds(count) for _ in range(min(most, max(least, wanted)))])
