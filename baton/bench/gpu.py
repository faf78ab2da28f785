"""Everything that a machine with a GPU should be asked at once, in under ten minutes.

    PYTHONPATH=. python -m baton.bench.gpu --out results

Runs on a bare machine: this module needs the standard library only, its parts torch and Triton, and
what transformers brings. Every part is a process with a deadline of its own, so that one that fails
or hangs hides no other; results are written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 570.0
_TAIL = 40  # lines of a failed part's output that are kept
_TERM_S = 3.0


@dataclass(frozen=True, slots=True)
class Part:
    """A function of `baton.bench.gpu_parts`; it is killed after `deadline_s` seconds."""

    name: str
    deadline_s: float


PARTS = (
    Part("machine", 60.0),
    Part("tests", 150.0),
    Part("weights", 90.0),
    Part("attention", 60.0),
    Part("decode", 120.0),
    Part("prefill", 90.0),
    Part("kernels", 90.0),
    Part("steps", 60.0),
    Part("transformers", 90.0),
    Part("vllm", 150.0),
)
"""In the order of what one would miss most; the last ones get what time is left."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part. `result` is what it wrote, `output` the end of what it printed."""

    name: str
    status: str  # "ok" | "failed" | "timed out" | "no time left"
    seconds: float
    result: Mapping[str, Any]
    output: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every part ended well."""
    options = parse(arguments)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    names = options.parts.split(",") if options.parts else [part.name for part in PARTS]
    end = time.monotonic() + options.limit
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="baton-gpu-") as scratch:
        for part in PARTS:
            if part.name in names:
                _say(f"{part.name} ...")
                outcome = run_part(part, Path(scratch), options, end - time.monotonic())
                _say(f"{part.name}: {outcome.status} after {outcome.seconds:.0f} s")
                outcomes.append(outcome)
                _write(out, outcomes, options)
    _say((out / "gpu.md").read_text(encoding="utf-8"))
    return 0 if all(outcome.status == "ok" for outcome in outcomes) else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m baton.bench.gpu", description=__doc__)
    parser.add_argument("--out", default=os.environ.get("OUT", "gpu-results"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--shape", default="qwen3-8b", help="see baton.bench.engine_models")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for everything")
    parser.add_argument("--parts", default="", help="by commas; without it all")
    options = parser.parse_args(arguments)
    known = {part.name for part in PARTS}
    if options.parts and not set(options.parts.split(",")) <= known:
        parser.error(f"--parts takes some of {', '.join(part.name for part in PARTS)}")
    if options.quick:
        options.shape = "tiny"
    return options


def run_part(part: Part, scratch: Path, options: argparse.Namespace, left_s: float) -> Outcome:
    """Run a part in a process group of its own, which is ended at the deadline."""
    deadline_s = min(part.deadline_s, left_s)
    if deadline_s <= 0:
        return Outcome(part.name, "no time left", 0.0, {}, ())
    result, log = scratch / f"{part.name}.json", scratch / f"{part.name}.log"
    command = command_of(part, scratch, options)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(_python_path())}
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status = "ok" if process.wait(deadline_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            _end(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    tail = () if status == "ok" else tuple(lines[-_TAIL:])
    return Outcome(part.name, status, time.monotonic() - start, found, tail)


def command_of(part: Part, scratch: Path, options: argparse.Namespace) -> list[str]:
    flags = ["--device", options.device, "--shape", options.shape, "--scratch", str(scratch)]
    flags += ["--quick"] if options.quick else []
    return [sys.executable, "-m", "baton.bench.gpu_parts", part.name, *flags]


def _python_path() -> list[str]:
    return [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: a part may have left children behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_TERM_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _write(out: Path, outcomes: Sequence[Outcome], options: argparse.Namespace) -> None:
    report = {
        "benchmark": "gpu",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": {name: str(value) for name, value in vars(options).items() if name != "out"},
        "parts": {
            outcome.name: {
                "status": outcome.status,
                "seconds": outcome.seconds,
                "output": outcome.output,
                **outcome.result,
            }
            for outcome in outcomes
        },
    }
    (out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text("\n".join(map(_markdown, outcomes)), encoding="utf-8")


def _markdown(outcome: Outcome) -> str:
    text = f"# {outcome.name}: {outcome.status}, {outcome.seconds:.0f} s\n\n"
    text += str(outcome.result.get("markdown", ""))
    if outcome.output:
        text += "\n```\n" + "\n".join(outcome.output) + "\n```\n"
    return text


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
