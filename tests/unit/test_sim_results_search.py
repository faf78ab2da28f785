"""The highest load that keeps limits: bisection, which runs it takes, what is written about it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.fleet.spec import FleetSpec
from sim.results import bisection
from sim.results.experiments.search import (
    Found,
    Limit,
    Search,
    Searched,
    kept_search,
    searched,
)
from sim.results.markdown import NOT_RUN
from sim.results.page import page
from sim.results.runs import Replay, Run

STRONG, WEAK = FleetSpec("2P+2D"), FleetSpec("4M")
SEARCH = Search(
    "toy",
    "A toy",
    "Leads.",
    90.0,
    (Limit("lax", lambda o: o.result["lax"]), Limit("strict", lambda o: o.result["strict"])),
    (("strong", STRONG), ("weak", WEAK)),
    quick=Replay(first=3),
    full=Replay(first=5),
    why="Because.",
)


class FakeRuns:
    """A fleet keeps the lax limit up to a speed, and the strict one up to half of it."""

    def __init__(self, first: int = 3, most: int | None = None) -> None:
        self.made: list[Run] = []
        self._first = first
        self._most = most  # runs that are kept

    def outcome(self, run: Run) -> Any:
        if run.replay.first != self._first or len(self.made) == self._most:
            return None
        self.made.append(run)
        upto = 3.0 if run.spec == STRONG else 0.8
        kept = {
            "lax": 95.0 if run.replay.speed <= upto else 80.0,
            "strict": 95.0 if run.replay.speed <= upto / 2 else 80.0,
        }
        return SimpleNamespace(run=run, result=kept, cpu_s=1.0, wall_s=2.0)


def section_of(told: Searched) -> str:
    return page([told], "abc", "")


@given(st.integers(-40, 40), st.integers(-33, 0), st.integers(0, 33))
def test_bisection_finds_the_last_that_holds(last: int, least: int, most: int) -> None:
    tried: list[int] = []

    def holds(step: int) -> bool:
        tried.append(step)
        return step <= last

    assert bisection.highest(holds, least, most) == max(least - 1, min(last, most))
    assert len(set(tried)) == len(tried) <= 10
    assert all(least <= step <= most for step in tried)


def test_a_search_finds_the_speed_of_every_limit_and_makes_no_run_twice() -> None:
    runs = FakeRuns()
    told = searched(SEARCH, SEARCH.quick, runs)  # type: ignore[arg-type]
    speeds = [[bisection.speed_of(step or 0) for step in found.steps] for found in told.found]
    assert speeds == [
        [pytest.approx(2.828), pytest.approx(1.414)],
        [pytest.approx(0.771), pytest.approx(0.386)],
    ]
    assert len(set(runs.made)) == len(runs.made) == len(told.outcomes)


def test_a_section_has_speeds_and_how_much_more_the_first_takes() -> None:
    text = section_of(searched(SEARCH, SEARCH.quick, FakeRuns()))  # type: ignore[arg-type]
    assert "|  | lax | strong over it | strict | strong over it |" in text
    assert "| strong | 2.83 × |  | 1.41 × |  |" in text
    assert "| weak | 0.77 × | +267 % | 0.39 × | +266 % |" in text
    assert "The first 3 requests of the trace; " in text
    assert "python -m sim.fleet --trace FILE --cluster 4M --first 3 --speed 0.386" in text


def test_what_was_not_simulated_is_said() -> None:
    assert f"{NOT_RUN.capitalize()}." in section_of(kept_search(SEARCH, FakeRuns(7)))  # type: ignore[arg-type]
    assert f"{NOT_RUN.capitalize()}." in section_of(kept_search(SEARCH, FakeRuns(most=1)))  # type: ignore[arg-type]
    some = kept_search(SEARCH, FakeRuns(most=9))  # type: ignore[arg-type]
    assert [step is None for step in some.found[0].steps] == [False, False]
    assert f"| weak | {NOT_RUN} |  | {NOT_RUN} |  |" in section_of(some)


def test_the_full_size_comes_first() -> None:
    assert kept_search(SEARCH, FakeRuns(5)).replay == SEARCH.full  # type: ignore[arg-type]
    assert kept_search(SEARCH, FakeRuns(3)).replay == SEARCH.quick  # type: ignore[arg-type]


def test_speeds_beyond_what_is_looked_at_are_bounds() -> None:
    below, above = Found("weak", (bisection.LEAST - 1,)), Found("strong", (bisection.MOST,))
    outcome = FakeRuns().outcome(Run(WEAK, Replay(first=3)))
    text = section_of(Searched(SEARCH, SEARCH.quick, (above, below), (outcome,)))
    assert "| strong | ≥ 16.00 × |  |" in text
    assert "| weak | < 0.06 × |  |" in text
