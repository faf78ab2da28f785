"""`python -m bench.chaos`: kill and stop every kind of process in every phase of a request, under
load, and count what clients lost. `python -m bench.chaos report FILE...`: the table of earlier runs
together."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from bench.chaos import report
from bench.chaos.cells import Result, make_cells, run_cells
from bench.chaos.cluster import Shape
from bench.chaos.faults import Fault, Kind
from bench.chaos.phases import Phase
from bench.chaos.processes import ChaosFailed
from bench.chaos.repetition import Cell, Outcome

Name = TypeVar("Name", bound=StrEnum)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    usual = Shape()
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    add = parser.add_argument
    add("--repetitions", type=int, default=20, help="of every kind, phase and signal")
    add("--kinds", default=",".join(Kind), help="of processes to hit")
    add("--phases", default=",".join(Phase), help="of the marked request")
    add("--signals", default=f"{Fault.KILL},{Fault.STOP}")
    add("--seconds", type=float, help="begin no repetition after so long")
    add("--lease-ttl", type=float, default=usual.lease_ttl_s, help="of workers and conductors")
    add("--dtype", default=usual.dtype, choices=("auto", "float32", "bfloat16"))
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write every outcome there")
    add("--logs", type=Path, metavar="DIR", help="keep the logs of all processes there")
    return parser.parse_args(argv)


def _names(text: str, known: type[Name]) -> tuple[Name, ...]:
    return tuple(known(name.strip()) for name in text.split(",") if name.strip())


def _run(options: argparse.Namespace, shape: Shape) -> Result:
    """Raises ChaosFailed, and ValueError for names that nothing has."""
    kinds, phases = _names(options.kinds, Kind), _names(options.phases, Phase)
    cells = make_cells(kinds, phases, _names(options.signals, Fault))
    started = time.monotonic()

    def tell(what: Outcome | Cell) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {report.line(what)}", flush=True)

    work = run_cells(
        shape,
        cells,
        options.repetitions,
        limit_s=options.seconds,
        seed=options.seed,
        logs=options.logs,
        tell=tell,
    )
    return asyncio.run(_until_signal(work))


async def _until_signal(work: Coroutine[object, object, Result]) -> Result:
    """SIGTERM ends every process, as Ctrl-C does."""
    task = asyncio.create_task(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _runs(file: Path) -> list[dict[str, Any]]:
    """A file has one run, as `--json` writes it, or a list of them."""
    content = json.loads(file.read_text(encoding="utf-8"))
    return content if isinstance(content, list) else [content]


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["report"]:
        print(report.as_markdown([run for file in argv[1:] for run in _runs(Path(file))]))
        return 0
    options = _arguments(argv)
    shape = Shape(lease_ttl_s=options.lease_ttl, dtype=options.dtype)
    try:
        result = _run(options, shape)
    except (ChaosFailed, ValueError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    content = report.content(shlex.join(["python", "-m", "bench.chaos", *argv]), shape, result)
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(report.as_markdown([content]))
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
