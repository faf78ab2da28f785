"""`python -m bench`: measure baton and its peers in turns. `python -m bench report FILE...`: tables
of earlier results as Markdown."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path

from baton.bench.trace import TraceRequest
from baton.errors import ConfigError
from bench import report
from bench.environments import CACHE, EnvironmentFailed
from bench.process import adopt_orphans
from bench.session import Plan, Result, find_pythons, run_models
from bench.shapes import SHAPES
from bench.systems import SYSTEMS, parse_cpus
from bench.trace import read_trace
from bench.workloads import WORKLOADS, Setting

_QUICK_WORKLOADS = "batch16,shared,stream"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="what there is to measure, and end")
    add("--models", default="small", help="shapes of random models (made on first use)")
    add("--systems", default="baton,baton-1p1d,vllm,transformers")
    add("--workloads", default=",".join(WORKLOADS), help="in the order of measurement")
    add("--rounds", type=int, default=5)
    add("--cpus", default="", help="cores for servers and client, such as 0-1 (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--trace", type=Path, help="JSONL in Mooncake's format; without it no trace workloads")
    add("--json", type=Path, metavar="FILE", help="write every figure there")
    add("--quick", action="store_true", help="one short round of three workloads, to try it out")
    add("--restart", action="store_true", help="start servers anew each turn, park none")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="of one request")
    add("--lock", type=Path, metavar="FILE", help="hold this lock, as flock(1), while measuring")
    add("--noise", type=float, metavar="SHARE", help="repeat rounds where others used more")
    add(
        "--extra",
        action="append",
        default=[],
        metavar="SYSTEM=FLAGS",
        help="more flags for a system, such as --extra 'baton=--verify off'",
    )
    return parser.parse_args(argv)


def _list() -> None:
    print("models (--models)")
    for name, shape in SHAPES.items():
        print(
            f"  {name:<14} {shape.layers} layers of {shape.hidden}, {shape.heads}/{shape.kv_heads} "
            f"heads of {shape.head_dim}, vocabulary {shape.vocab:,}"
        )
    print("systems (--systems)")
    for name, system in SYSTEMS.items():
        print(f"  {name:<14} {system.describe}")
    print("workloads (--workloads)")
    for name, workload in WORKLOADS.items():
        print(f"  {name:<14} {workload.describe}")


def _plan(options: argparse.Namespace) -> Plan:
    """Raises ValueError for what does not exist."""
    if options.quick:
        options.rounds = 1
        if options.workloads == ",".join(WORKLOADS):
            options.workloads = _QUICK_WORKLOADS
    workloads = _names(options.workloads, WORKLOADS, "workload")
    if options.trace is None and any(WORKLOADS[name].needs_trace for name in workloads):
        print("trace workloads are left out: give --trace FILE for them")
        workloads = tuple(name for name in workloads if not WORKLOADS[name].needs_trace)
    extra = {}
    for text in options.extra:
        name, _, flags = text.partition("=")
        extra[_names(name, SYSTEMS, "system")[0]] = tuple(shlex.split(flags))
    systems = _names(options.systems, SYSTEMS, "system")
    for name in systems:
        if options.device not in SYSTEMS[name].devices:
            raise ValueError(f"{name} is not measured on {options.device}")
    return Plan(
        models={name: CACHE / "models" / name for name in _names(options.models, SHAPES, "model")},
        systems=systems,
        workloads=workloads,
        rounds=options.rounds,
        cpus=parse_cpus(options.cpus),
        device=options.device,
        restart=options.restart,
        timeout_s=options.timeout,
        lock=options.lock,
        noise_limit=options.noise,
        extra=extra,
    )


def _names(text: str, known: Mapping[str, object], what: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; there are {', '.join(known)}")
    return names


def _make_models(plan: Plan) -> None:
    """In a process of its own, whose memory and torch are gone before anything is measured."""
    for name in plan.models:
        subprocess.run(
            [sys.executable, "-m", "bench.models", name, "--dir", str(CACHE / "models")],
            stdout=subprocess.DEVNULL,
            check=True,
        )


def _measure(options: argparse.Namespace, command: str) -> int:
    plan = _plan(options)
    trace: tuple[TraceRequest, ...] = read_trace(options.trace) if options.trace else ()
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)

    pythons = find_pythons(plan, say)
    _make_models(plan)
    os.sched_setaffinity(0, plan.cpus)  # what is started inherits it
    adopt_orphans()
    settings = {
        name: Setting(SHAPES[name].vocab, options.seed, options.quick, trace)
        for name in plan.models
    }
    result = Result()
    interrupted = False
    try:
        asyncio.run(_until_signal(run_models(plan, settings, pythons, result, say)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        interrupted = True
        print("interrupted: what was measured so far follows")
    how = {"seed": options.seed, "quick": options.quick, "interrupted": interrupted}
    content = result.as_json(plan, command, how)
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\n" + report.document([content], report.as_text), end="")
    return 130 if interrupted else 0


async def _until_signal(work: Coroutine[object, object, None]) -> None:
    """SIGTERM ends the servers as Ctrl-C does."""
    task = asyncio.create_task(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await task


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["report"]:
        results = [json.loads(Path(file).read_text(encoding="utf-8")) for file in argv[1:]]
        print(report.document(results, report.as_markdown), end="")
        return 0
    options = _arguments(argv)
    if options.list:
        _list()
        return 0
    try:
        return _measure(options, shlex.join(["python", "-m", "bench", *argv]))
    except (ValueError, ConfigError, EnvironmentFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
