"""What a search found, as part of the page."""

from __future__ import annotations

from collections.abc import Iterator

from sim.results import bisection
from sim.results.experiments.search import Found, Searched
from sim.results.markdown import NOT_RUN, size, table


def searched_parts(told: Searched, sources: str) -> Iterator[str]:
    heads = [""]
    for limit in told.search.limits:
        heads += [limit.heading, f"{told.found[0].label} over it"]
    yield table(heads, [[found.label, *_cells(told, found)] for found in told.found])
    yield size(told.replay, told.outcomes, len(told.outcomes), sources)


def _cells(told: Searched, found: Found) -> Iterator[str]:
    for step, first in zip(found.steps, told.found[0].steps, strict=True):
        yield _speed(step)
        yield "" if found is told.found[0] else _more(step, first)


def _speed(step: int | None) -> str:
    if step is None:
        return NOT_RUN
    if step < bisection.LEAST:
        return f"< {bisection.speed_of(bisection.LEAST):.2f} ×"
    more = "≥ " if step == bisection.MOST else ""
    return f"{more}{bisection.speed_of(step):.2f} ×"


def _more(step: int | None, first: int | None) -> str:
    if step is None or first is None or step < bisection.LEAST:
        return ""
    return f"{100 * (bisection.speed_of(first) / bisection.speed_of(step) - 1):+.0f} %"
