"""What an experiment is: rows of specs, columns of figures, next to what is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sim.fleet.spec import FleetSpec
from sim.results.runs import Outcome, Replay


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a run. With `over_first`, it is shown over that of the first row, too."""

    heading: str
    of: Callable[[Outcome], float]
    form: str  # as in str.format
    over_first: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """`published`: in the column's unit, by its heading."""

    label: str
    spec: FleetSpec
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Experiment:
    """`why`: reasons where simulated and published figures differ."""

    key: str
    title: str
    lead: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    quick: Replay
    full: Replay
    why: str
