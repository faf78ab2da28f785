"""When requests arrive: endless ascending times in seconds, each sequence made from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator


def poisson(rate: float, seed: int) -> Iterator[float]:
    """`rate` arrivals per second, each independent of the others."""
    generator = random.Random(f"poisson/{seed}")
    at_s = 0.0
    while True:
        at_s += generator.expovariate(rate)
        yield at_s


def bursts(
    rate: float, seed: int, factor: float = 5.0, share: float = 0.1, burst_s: float = 10.0
) -> Iterator[float]:
    """A Markov-modulated Poisson process of two states: `share` of the time, in bursts of `burst_s`
    on average, arrivals are `factor` times as frequent as else; `rate` is the mean of it all."""
    generator = random.Random(f"bursts/{seed}")
    calm_rate = rate / (1 - share + factor * share)
    lengths = (burst_s * (1 - share) / share, burst_s)  # mean seconds of calm and of a burst
    rates = (calm_rate, calm_rate * factor)
    at_s, bursting = 0.0, generator.random() < share
    ends_s = generator.expovariate(1 / lengths[bursting])
    while True:
        gap = generator.expovariate(rates[bursting])
        if at_s + gap < ends_s:
            at_s += gap
            yield at_s
        else:  # without memory: what is left of the gap is drawn anew, at the other rate
            at_s, bursting = ends_s, not bursting
            ends_s += generator.expovariate(1 / lengths[bursting])


def diurnal(
    rate: float, seed: int, period_s: float = 3600.0, depth: float = 0.8
) -> Iterator[float]:
    """A day of `period_s` seconds: the rate follows a sine from `1 - depth` of the mean, at the
    beginning, to `1 + depth` of it half a day later."""

    def now(at_s: float) -> float:
        return rate * (1 - depth * math.cos(2 * math.pi * at_s / period_s))

    return _thinned(now, rate * (1 + depth), random.Random(f"diurnal/{seed}"))


def _thinned(
    rate: Callable[[float], float], peak: float, generator: random.Random
) -> Iterator[float]:
    """A Poisson process whose rate changes with time (Lewis and Shedler 1979, thinning)."""
    at_s = 0.0
    while True:
        at_s += generator.expovariate(peak)
        if generator.random() * peak < rate(at_s):
            yield at_s
