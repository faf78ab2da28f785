"""What a process counts: plain objects, without the library that exports them.

Made by `Counts` they are counted and not exported, as in benchmarks and tests; made by
`baton.telemetry.Metrics`, they are exported.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import ItemsView, Iterable, Sequence
from itertools import accumulate


class Tally:
    """A counter for what happens per token: without the lock and the checks of the library's, which
    take longer than the rest of the work. Incremented by one thread."""

    def __init__(self) -> None:
        self.value = 0


class Tallies:
    """Tallies by one label. All its values are said at the start: nobody can add others, and each
    is exported from the start on, so that rates see its first event."""

    def __init__(self, values: Iterable[str]) -> None:
        self._counts = dict.fromkeys(map(str, values), 0)

    def add(self, value: str, count: int = 1) -> None:
        """Raises KeyError for a label that was not said."""
        self._counts[value] += count

    def __getitem__(self, value: str) -> int:
        return self._counts[value]

    def items(self) -> ItemsView[str, int]:
        return self._counts.items()


class Buckets:
    """How often values fell below each of `bounds`, which ascend; a histogram for what happens per
    token, see Tally."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def cumulated(self) -> list[tuple[str, float]]:
        """As histograms are exported."""
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


class Distributions:
    """Buckets by one label; see Tallies."""

    def __init__(self, bounds: Sequence[float], values: Iterable[str]) -> None:
        self._parts = {str(value): Buckets(bounds) for value in values}

    def __getitem__(self, value: str) -> Buckets:
        """Raises KeyError for a label that was not said."""
        return self._parts[value]

    def items(self) -> ItemsView[str, Buckets]:
        return self._parts.items()


class Counts:
    """Makes what is counted. `name` begins with `baton_`; nobody exports it."""

    def tally(self, name: str, help: str) -> Tally:
        return Tally()

    def tallies(self, name: str, help: str, label: str, values: Iterable[str]) -> Tallies:
        return Tallies(values)

    def distribution(self, name: str, help: str, bounds: Sequence[float]) -> Buckets:
        return Buckets(bounds)

    def distributions(
        self, name: str, help: str, bounds: Sequence[float], label: str, values: Iterable[str]
    ) -> Distributions:
        return Distributions(bounds, values)
