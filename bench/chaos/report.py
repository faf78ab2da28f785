"""What came of a run: one line per repetition, a table, and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bench.chaos.cells import Result
from bench.chaos.cluster import Shape
from bench.chaos.faults import Fault, Kind
from bench.chaos.phases import Phase
from bench.chaos.repetition import Cell, Outcome

_HEADER = (
    "| killed or stopped | phase | signal | repetitions | requests | lost | wrong tokens "
    "| blocks leaked | added latency p50 / p99, s | noticed p50 / p99, s | recovery p50 / p99, s |"
)
_RULE = "| --- | --- | --- " + "| ---: " * 8 + "|"


def line(outcome: Outcome | Cell) -> str:
    """For somebody who watches."""
    if isinstance(outcome, Cell):
        return f"{outcome.fault} {outcome.kind} {outcome.phase}: the phase could not be caught"
    cell, back = outcome.cell, outcome.recovery
    what = cell.phase if cell.fault is Fault.NONE else f"{cell.fault} {outcome.victim} {cell.phase}"
    told = f"{what}: {outcome.marked_s:.1f} s in {len(outcome.attempts)} attempts"
    if back.noticed_s is not None:
        told += f", noticed after {back.noticed_s:.1f} s"
    if back.recovery_s is not None:
        told += f", back after {back.recovery_s:.1f} s"
    if outcome.missed:
        told += f", missed {outcome.missed} times"
    for name, found in asdict(outcome.problems).items():
        told += "".join(f"\n    {name}: {problem}" for problem in found)
    if not outcome.good:
        told += "".join(f"\n    {attempt}" for attempt in outcome.attempts)
    return told


def content(command: str, shape: Shape, result: Result) -> dict[str, Any]:
    return {"command": command, "cluster": asdict(shape), **asdict(result)}


def as_markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table with a row per kind, phase and signal, and what was left at the end of each run."""
    outcomes = [outcome for run in runs for outcome in run["outcomes"]]
    undisturbed = {
        phase: statistics.median(o["marked_s"] for o in group)
        for (_, phase, fault), group in _cells(outcomes).items()
        if fault == Fault.NONE
    }
    rows = [_HEADER, _RULE]
    for (kind, phase, fault), group in _cells(outcomes).items():
        if fault != Fault.NONE:
            usual = undisturbed.get(phase)
            added = [] if usual is None else [o["marked_s"] - usual for o in group]
            rows.append(_row(kind, phase, fault, group, added))
    hit = [o for o in outcomes if o["cell"]["fault"] != Fault.NONE]
    rows.append(_row("all", "", "", hit, []))
    return "\n".join(
        [*rows, "", f"Undisturbed, median s: {_named(undisturbed)}.", *map(_end, runs)]
    )


def _end(run: Mapping[str, Any]) -> str:
    left = run["left"]
    remains = ", ".join(f"{len(left[name])} {name}" for name in ("processes", "segments", "files"))
    codes = {name: code for name, code in left["exit_codes"].items() if code}
    return (
        f"`{run['command']}`: {len(run['outcomes'])} repetitions, {len(run['missed'])} whose phase "
        f"could not be caught; left after the end: {remains}; exit codes other than 0: "
        f"{codes or 'none'}."
    )


def _cells(
    outcomes: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """In the order of kinds, phases and signals."""
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        cell = outcome["cell"]
        cells.setdefault((cell["kind"], cell["phase"], cell["fault"]), []).append(outcome)
    order = [(*Kind,), (*Phase,), (*Fault,)]
    return dict(
        sorted(cells.items(), key=lambda c: [n.index(v) for n, v in zip(order, c[0], strict=True)])
    )


def _row(
    kind: str, phase: str, fault: str, group: Sequence[Mapping[str, Any]], added: Sequence[float]
) -> str:
    counts = [sum(len(o["problems"][name]) for o in group) for name in ("lost", "wrong", "leaked")]
    requests = sum(o["requests"] for o in group)
    times = [_spread(added)] + [
        _spread([o["recovery"][name] for o in group if o["recovery"][name] is not None])
        for name in ("noticed_s", "recovery_s")
    ]
    cells = [kind, phase, fault, len(group), requests, *counts, *times]
    return "| " + " | ".join(map(str, cells)) + " |"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):.1f} / {_p99(values):.1f}"


def _p99(values: Sequence[float]) -> float:
    """The value that 99 % do not exceed; the largest of fewer than a hundred."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, -(-99 * len(ranked) // 100) - 1)]


def _named(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items()) or "none"
