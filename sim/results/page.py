"""The page: a section per experiment, with what was run, and nothing that was not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sim.results.experiments.experiment import Column, Experiment
from sim.results.experiments.search import Searched
from sim.results.markdown import NOT_RUN, commands, size, table, wrapped
from sim.results.runs import Outcome, Replay, Run, Runs
from sim.results.search_section import searched_parts
from sim.results.sparkline import sparklines

BY_HAND = "<!-- What follows is written by hand; what precedes is not. -->"

_HEAD = """# Mooncake's published figures, simulated

Made by `make results TRACE=FILE` (with `RESULTS_FLAGS=--quick`: a piece of the trace for each run),
where FILE is the conversation trace of Mooncake (FAST'25 artifact). What is simulated, and what it
leaves out, is in [../sim.md](../sim.md). Every row is one run with one seed. What is not in its
command has the default of `python -m sim.fleet`. CPU and wall times are those of the simulations,
next to whatever else the machine did. Sources are what ran them (`sim/results/runs.py`): sections
that were not run again stay as they were.
"""


@dataclass(frozen=True, slots=True)
class Findings:
    """Of one experiment: its runs, in the order of its rows; None was not run."""

    experiment: Experiment
    runs: tuple[Run, ...]
    outcomes: tuple[Outcome | None, ...]

    @property
    def is_known(self) -> bool:
        return any(self.outcomes)


def findings(experiment: Experiment, runs: Runs) -> Findings:
    """Of the full size, or of the quick one where more of that was run."""
    sizes = (experiment.quick, experiment.full)
    tried = [_of_size(experiment, replay, runs) for replay in sizes]
    return max(reversed(tried), key=lambda found: sum(map(bool, found.outcomes)))


def _of_size(experiment: Experiment, replay: Replay, runs: Runs) -> Findings:
    wanted = experiment.runs(replay)
    return Findings(experiment, wanted, tuple(runs.outcome(run) for run in wanted))


def page(found: Sequence[Findings | Searched], sources: str, before: str) -> str:
    """`before`: the page so far, of which the part by hand is kept, and sections of which these
    sources have no run."""
    made, _, by_hand = before.partition(BY_HAND)
    earlier = _sections(made)
    sections = [_HEAD, *(_section(one, sources, earlier) for one in found)]
    if by_hand:
        sections.append(f"{BY_HAND}\n\n{by_hand.strip()}\n")
    return "\n".join(sections)


def _sections(text: str) -> Mapping[str, str]:
    """By title."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def _section(found: Findings | Searched, sources: str, earlier: Mapping[str, str]) -> str:
    told = found.search if isinstance(found, Searched) else found.experiment
    title, lead = f"## {told.title}\n", wrapped(told.lead)
    if not found.is_known:
        unknown = "\n".join([title, lead, f"{NOT_RUN.capitalize()}.\n"])
        return earlier.get(told.title, unknown)
    if isinstance(found, Searched):
        figures, runs = searched_parts(found, sources), found.runs
    else:
        figures, runs = _parts(found, sources), found.runs
    why = [wrapped(told.why)] if told.why else []
    return "\n".join([title, lead, *figures, *why, commands(runs)])


def _parts(found: Findings, sources: str) -> Iterator[str]:
    kept = [outcome for outcome in found.outcomes if outcome is not None]
    yield _table(found)
    yield from _drawn(found)
    yield size(found.runs[0].replay, kept, len(found.runs), sources)


def _drawn(found: Findings) -> Iterator[str]:
    curves = found.experiment.curves
    if curves is not None:
        rows = zip(found.experiment.rows, found.outcomes, strict=True)
        drawn = sparklines({row.label: curves(one) for row, one in rows if one is not None})
        yield f"```\n{drawn}```\n"


def _table(found: Findings) -> str:
    columns = found.experiment.columns
    heads = ["", *(head for column in columns for head in _heads(found, column))]
    rows = [
        [row.label, *(text for column in columns for text in _cells(found, column, number))]
        for number, row in enumerate(found.experiment.rows)
    ]
    return table(heads, rows)


def _heads(found: Findings, column: Column) -> Iterator[str]:
    for told in ("", ", published") if _is_published(found, column) else ("",):
        yield column.heading + told
        if column.over_first:
            yield "× first row" + told


def _cells(found: Findings, column: Column, number: int) -> Iterator[str]:
    simulated = [None if outcome is None else column.of(outcome) for outcome in found.outcomes]
    yield from _shown(column, simulated, number, NOT_RUN)
    if _is_published(found, column):
        rows = found.experiment.rows
        published = [row.published.get(column.heading) for row in rows]
        yield from _shown(column, published, number, "")


def _shown(
    column: Column, figures: Sequence[float | None], number: int, nothing: str
) -> Iterator[str]:
    figure, first = figures[number], figures[0]
    yield nothing if figure is None else column.form.format(figure)
    if column.over_first:
        yield "" if figure is None or not first else f"{figure / first:.2f}"


def _is_published(found: Findings, column: Column) -> bool:
    return any(column.heading in row.published for row in found.experiment.rows)
