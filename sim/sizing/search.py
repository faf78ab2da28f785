"""The smallest fleet that keeps the SLOs, by trying: pure, what a try is the caller says.

    estimate -> grow the pool whose SLO is missed, until both are kept -> bisect each pool down

Prefill workers decide TTFT and decode workers TBT, and more of either never makes it worse: that
is assumed, so that a fleet is the smallest when it misses the SLOs with one worker less in either
pool. What the search says is true of each fleet that was tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import ConfigError

MARGIN_STEP = 0.05  # of the load, to which the margin is known
MOST_LOAD = 16.0  # times the load, at which the search for the margin ends


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares of all requests."""

    good: float  # within both SLOs
    ttft: float
    tbt: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """`prefill` 0: coupled."""

    prefill: int
    rest: int

    @property
    def nodes(self) -> int:
        return self.prefill + self.rest

    def __str__(self) -> str:
        return f"{self.prefill}P+{self.rest}D" if self.prefill else f"{self.rest}M"


Simulate = Callable[[Fleet, float], Outcome]
"""A fleet under so many times the load."""


@dataclass(frozen=True, slots=True)
class Tried:
    fleet: Fleet
    load: float
    outcome: Outcome


class Search:
    """For a fleet of at most `most_nodes` in which `share` of the requests keep both SLOs. Nothing
    is simulated twice; `tried` has everything in its order."""

    def __init__(self, simulate: Simulate, share: float, most_nodes: int) -> None:
        self._simulate = simulate
        self._share = share
        self._most_nodes = most_nodes
        self._known: dict[tuple[Fleet, float], Outcome] = {}

    @property
    def tried(self) -> list[Tried]:
        return [Tried(fleet, load, outcome) for (fleet, load), outcome in self._known.items()]

    def outcome(self, fleet: Fleet, load: float = 1.0) -> Outcome:
        key = fleet, load
        if key not in self._known:
            self._known[key] = self._simulate(fleet, load)
        return self._known[key]

    def keeps(self, fleet: Fleet, load: float = 1.0) -> bool:
        return self.outcome(fleet, load).good >= self._share

    def disaggregated(self, prefill: int, decode: int) -> Fleet:
        """The smallest, found from an estimate. Raises ConfigError when there is none."""
        enough = self._grown(prefill, decode)
        first = least(enough.prefill, lambda n: self.keeps(Fleet(n, enough.rest)))
        then = least(enough.rest, lambda n: self.keeps(Fleet(first, n)))
        return Fleet(first, then)

    def coupled(self, most: int) -> Fleet | None:
        """The smallest of at most `most` workers; None if not even these keep the SLOs."""
        if not self.keeps(Fleet(0, most)):
            return None
        return Fleet(0, least(most, lambda n: self.keeps(Fleet(0, n))))

    def margin(self, fleet: Fleet) -> float:
        """How many times the load it takes, of MARGIN_STEP precision: at least 1."""
        low, high = 0, 4  # steps above the load
        while self.keeps(fleet, _load(high)):
            low, high = high, 2 * high
            if _load(low) >= MOST_LOAD:
                return MOST_LOAD
        while high - low > 1:
            middle = (low + high) // 2
            if self.keeps(fleet, _load(middle)):
                low = middle
            else:
                high = middle
        return _load(low)

    def _grown(self, prefill: int, decode: int) -> Fleet:
        fleet = Fleet(prefill, decode)
        while not self.keeps(fleet):
            if fleet.nodes >= self._most_nodes:
                raise ConfigError(
                    f"no fleet of {self._most_nodes} nodes keeps the SLOs for {self._share:.0%} of "
                    f"the requests: {fleet} does for {self.outcome(fleet).good:.1%} (--most-nodes)"
                )
            fleet = self._larger(fleet)
        return fleet

    def _larger(self, fleet: Fleet) -> Fleet:
        """By a quarter, of the pool whose SLO is missed by more."""
        outcome = self.outcome(fleet)
        spare = self._most_nodes - fleet.nodes
        if outcome.ttft <= outcome.tbt:
            return Fleet(fleet.prefill + min(spare, -(-fleet.prefill // 4)), fleet.rest)
        return Fleet(fleet.prefill, fleet.rest + min(spare, -(-fleet.rest // 4)))


def least(enough: int, holds: Callable[[int], bool]) -> int:
    """The smallest number from 1 for which it holds, when it holds for `enough`. Beginning near
    `enough`: estimates are good."""
    step, low = 1, enough
    while low > 1 and holds(max(1, low - step)):
        low, step = max(1, low - step), 2 * step
    missed = max(0, low - step)  # 0 stands for none
    while low - missed > 1:
        middle = (low + missed) // 2
        if holds(middle):
            low = middle
        else:
            missed = middle
    return low


def _load(steps: int) -> float:
    return round(1 + MARGIN_STEP * steps, 6)
