"""What an experiment is: rows of specs, columns of figures, next to what is published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from sim.fleet.spec import FleetSpec
from sim.results.runs import Outcome, Replay, Run

Curves = Mapping[str, npt.NDArray[np.float64]]  # by name, over time


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a run. With `over_first`, it is shown over that of the first row, too."""

    heading: str
    of: Callable[[Outcome], float]
    form: str  # as in str.format
    over_first: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """`published`: in the column's unit, by its heading. `make`: a generated trace (`Replay.make`)
    in place of the recorded one. `speed`: times that of the other rows."""

    label: str
    spec: FleetSpec
    published: Mapping[str, float] = field(default_factory=dict)
    make: str = ""
    speed: float = 1.0


@dataclass(frozen=True, slots=True)
class Experiment:
    """`why`: reasons where simulated and published figures differ. `curves`: what is drawn of each
    row below the table."""

    key: str
    title: str
    lead: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    quick: Replay
    full: Replay
    why: str
    curves: Callable[[Outcome], Curves] | None = None

    def runs(self, replay: Replay) -> tuple[Run, ...]:
        """One for each row."""
        return tuple(
            Run(row.spec, replace(replay, make=row.make, speed=replay.speed * row.speed))
            for row in self.rows
        )
