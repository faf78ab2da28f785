"""`python -m bench.chaos`: kill and stop every kind of process in every phase of a request, under
load, and count what clients lost."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from bench.chaos import report
from bench.chaos.cluster import Cluster, Leftovers, Shape, running
from bench.chaos.phases import Phase, PhaseMissed
from bench.chaos.processes import ChaosFailed
from bench.chaos.questions import make_questions
from bench.chaos.references import find_answers
from bench.chaos.repetition import Cell, Fault, Kind, Outcome, Repetitions

Name = TypeVar("Name", bound=StrEnum)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    usual = Shape()
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    add = parser.add_argument
    add("--repetitions", type=int, default=20, help="of every kind, phase and signal")
    add("--kinds", default=",".join(Kind), help="of processes to hit")
    add("--phases", default=",".join(Phase), help="of the marked request")
    add("--signals", default=f"{Fault.KILL},{Fault.STOP}")
    add("--seconds", type=float, default=0.0, help="begin no repetition after so long; 0: no limit")
    add("--lease-ttl", type=float, default=usual.lease_ttl_s, help="of workers and conductors")
    add("--dtype", default=usual.dtype, choices=("auto", "float32", "bfloat16"))
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write every outcome there")
    add("--logs", type=Path, metavar="DIR", help="keep the logs of all processes there")
    return parser.parse_args(argv)


def _names(text: str, known: type[Name]) -> tuple[Name, ...]:
    return tuple(known(name.strip()) for name in text.split(",") if name.strip())


def make_cells(
    kinds: Sequence[Kind], phases: Sequence[Phase], faults: Sequence[Fault]
) -> list[Cell]:
    """Every combination, and of each phase one without a fault to compare with."""
    compared = [Cell(Kind.PREFILL, phase, Fault.NONE) for phase in phases]
    combined = itertools.product(kinds, phases, faults)
    return compared + [Cell(kind, phase, fault) for kind, phase, fault in combined]


async def run_cells(
    shape: Shape, cells: Sequence[Cell], rounds: int, seconds: float, seed: int, logs: Path | None
) -> tuple[list[Outcome], list[str], Leftovers]:
    """All cells once, then again: a run that ends early has as many of each. Returns the outcomes,
    the phases that could not be caught, and what was left in the end."""
    outcomes: list[Outcome] = []
    missed: list[str] = []
    started = time.monotonic()
    async with running(shape, logs) as cluster:
        questions = make_questions(seed)
        urls = [cluster.url(name) for name in shape.conductor_names]
        answers = await find_answers(urls, questions.all)
        _say(started, f"{len(answers)} right answers")
        repetitions = Repetitions(cluster, questions, answers)
        for number, cell in itertools.product(range(rounds), cells):
            if seconds and time.monotonic() - started > seconds:
                break
            try:
                outcome = await repetitions.run(cell)
            except PhaseMissed as error:
                missed.append(f"{cell.fault} {cell.kind} {cell.phase}: {error}")
                _say(started, f"{number} missed {missed[-1]}")
                continue
            outcomes.append(outcome)
            _say(started, f"{number} {report.line(outcome)}")
        await _settle(cluster)
        left = await cluster.stop()
    return outcomes, missed, left


async def _settle(cluster: Cluster) -> None:
    """Everybody is there when the end comes, so that all of them are stopped in order."""
    await cluster.all_live(120.0)


def _say(started: float, line: str) -> None:
    print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["report"]:
        print(report.as_markdown(json.loads(Path(argv[1]).read_text(encoding="utf-8"))))
        return 0
    options = _arguments(argv)
    shape = Shape(lease_ttl_s=options.lease_ttl, dtype=options.dtype)
    try:
        kinds, phases = _names(options.kinds, Kind), _names(options.phases, Phase)
        cells = make_cells(kinds, phases, _names(options.signals, Fault))
        outcomes, missed, left = asyncio.run(
            run_cells(
                shape, cells, options.repetitions, options.seconds, options.seed, options.logs
            )
        )
    except (ChaosFailed, ValueError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "bench.chaos", *argv])
    content = report.content(command, shape, outcomes, missed, left)
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(report.as_markdown(content))
    return 0 if left.nothing and all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
