"""Axes of a plot: where a value lies between two ends, and the numbers written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_STEPS = (1.0, 2.0, 5.0, 10.0)
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

Format = Callable[[float], str]


def number(value: float) -> str:
    """At most three digits that count: 0.052, 3.4, 250, 12.5k, 1.2M."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if 0 < abs(value) < 1 else f"{number(value)} s"


def percent(value: float) -> str:
    return f"{value:.0%}"


@dataclass(frozen=True, slots=True)
class Scale:
    """From `low` to `high`, which differ; of a logarithmic one both are above 0. Numbers are
    written in `unit`s."""

    low: float
    high: float
    label: str
    log: bool = False
    format: Format = number
    unit: float = 1.0

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one; values outside are moved to the end."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Values inside whose numbers are round, ascending."""
        find = _log_ticks if self.log else _linear_ticks
        return [
            tick * self.unit for tick in find(self.low / self.unit, self.high / self.unit, most)
        ]

    def text(self, value: float) -> str:
        return self.format(value / self.unit)


def linear(largest: float, label: str, format: Format = number) -> Scale:
    """From 0 to a bit more than the largest value."""
    return Scale(0.0, largest * 1.05 if largest > 0 else 1.0, label, format=format)


def logarithmic(low: float, high: float, label: str, format: Format = number) -> Scale:
    """Of at least a decade, within nine decades below the high end."""
    high = max(high, 1e-9)
    low = min(max(low, high / 1e9), high / 10)
    return Scale(low, high, label, log=True, format=format)


def clock(end_s: float) -> Scale:
    """Seconds since the start, written in the unit that suits their length."""
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"))
    unit, name = next((pair for pair in units if end_s > 3 * pair[0]), (1.0, "seconds"))
    return Scale(0.0, max(end_s, 1e-3), f"{name} since the start", unit=unit)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in _STEPS if size * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [digit * 10.0**power for power in decades for digit in digits]
        inside = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]
