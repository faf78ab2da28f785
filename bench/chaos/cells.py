"""A run: every cell of the table once, then again, on one cluster."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.chaos.cluster import Leftovers, Shape, running
from bench.chaos.faults import Fault, Kind
from bench.chaos.phases import Phase, PhaseMissed
from bench.chaos.processes import ChaosFailed
from bench.chaos.questions import make_questions
from bench.chaos.references import find_answers
from bench.chaos.repetition import Cell, Outcome, Repetitions

_LIVE_S = 120.0


@dataclass(frozen=True, slots=True)
class Result:
    """`missed`: repetitions whose phase could not be caught. `left`: when everything had ended."""

    outcomes: tuple[Outcome, ...]
    missed: tuple[Cell, ...]
    left: Leftovers

    @property
    def good(self) -> bool:
        return self.left.nothing and all(outcome.good for outcome in self.outcomes)


def make_cells(
    kinds: Sequence[Kind], phases: Sequence[Phase], faults: Sequence[Fault]
) -> list[Cell]:
    """Every combination, and of each phase one without a fault to compare with."""
    compared = [Cell(Kind.PREFILL, phase, Fault.NONE) for phase in phases]
    combined = itertools.product(kinds, phases, faults)
    return compared + [Cell(kind, phase, fault) for kind, phase, fault in combined]


async def run_cells(
    shape: Shape,
    cells: Sequence[Cell],
    rounds: int,
    *,
    limit_s: float | None = None,
    seed: int = 0,
    logs: Path | None = None,
    tell: Callable[[Outcome | Cell], None] = lambda _: None,
) -> Result:
    """All cells once, then again: a run that ends early, because no repetition begins after
    `limit_s` seconds, has as many of each. `tell` hears of each outcome, and of cells that were
    missed. Raises ChaosFailed."""
    outcomes: list[Outcome] = []
    missed: list[Cell] = []
    ends = time.monotonic() + limit_s if limit_s is not None else None
    async with running(shape, logs) as cluster:
        questions = make_questions(seed)
        urls = [cluster.url(name) for name in shape.conductor_names]
        answers = await find_answers(urls, questions.all)
        repetitions = Repetitions(cluster, questions, answers)
        for _, cell in itertools.product(range(rounds), cells):
            if ends is not None and time.monotonic() > ends:
                break
            try:
                outcomes.append(await repetitions.run(cell))
                tell(outcomes[-1])
            except PhaseMissed:
                missed.append(cell)
                tell(cell)
        with suppress(ChaosFailed):  # then its exit code tells
            await cluster.all_live(_LIVE_S)  # so that all of them are stopped in order
        return Result(tuple(outcomes), tuple(missed), await cluster.stop())
