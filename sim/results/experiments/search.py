"""An experiment that looks for the highest load: one figure is the outcome of several runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sim.fleet.spec import FleetSpec
from sim.results import bisection
from sim.results.runs import Outcome, Replay, Run, Runs


@dataclass(frozen=True, slots=True)
class Limit:
    """`kept` says what percent of the requests of a run kept it."""

    heading: str
    kept: Callable[[Outcome], float]


@dataclass(frozen=True, slots=True)
class Search:
    """The highest speed at which at least `percent` of all requests keep a limit, for every fleet
    and limit. The first fleet is the one that others are compared with."""

    key: str
    title: str
    lead: str
    percent: float
    limits: tuple[Limit, ...]
    fleets: tuple[tuple[str, FleetSpec], ...]
    quick: Replay
    full: Replay
    why: str


@dataclass(frozen=True, slots=True)
class Found:
    """Of one fleet. The highest speed for each limit, as a step of `bisection`; None when a run was
    not made."""

    label: str
    steps: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search found, of the size `replay`, with the runs that it took."""

    search: Search
    replay: Replay
    found: tuple[Found, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def num_known(self) -> int:
        """Speeds that were found."""
        return sum(step is not None for found in self.found for step in found.steps)

    @property
    def is_known(self) -> bool:
        return self.num_known > 0

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(outcome.run for outcome in self.outcomes)


class _NotMade(Exception):
    """A run that is not kept, where nothing is to be simulated."""


def searched(search: Search, replay: Replay, runs: Runs) -> Searched:
    """A run serves all limits. Simulates what `runs` has not kept, if it may."""
    outcomes: dict[Run, Outcome] = {}

    def holds(spec: FleetSpec, limit: Limit, step: int) -> bool:
        run = Run(spec, replace(replay, speed=replay.speed * bisection.speed_of(step)))
        outcome = outcomes.get(run) or runs.outcome(run)
        if outcome is None:
            raise _NotMade
        outcomes[run] = outcome
        return limit.kept(outcome) >= search.percent

    def highest(spec: FleetSpec, limit: Limit) -> int | None:
        try:
            return bisection.highest(lambda step: holds(spec, limit, step))
        except _NotMade:
            return None

    found = tuple(
        Found(label, tuple(highest(spec, limit) for limit in search.limits))
        for label, spec in search.fleets
    )
    return Searched(search, replay, found, tuple(outcomes.values()))


def kept_search(search: Search, runs: Runs) -> Searched:
    """Of the full size, or of the quick one where more of that is known."""
    tried = [searched(search, replay, runs) for replay in (search.full, search.quick)]
    return max(tried, key=lambda one: one.num_known)
