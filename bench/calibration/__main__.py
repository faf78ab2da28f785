"""`python -m bench.calibration`: how well a calibrated simulation predicts real clusters here.

Measures an engine on one core, beside another, and an idle cluster; that is the calibration. Then
real clusters get Poisson arrivals, the simulator the same ones, and what clients saw is put side
by side. `--again RESULT` predicts anew what was measured before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from baton.cpus import available_cpus
from bench.calibration.cluster import Cluster, serving
from bench.calibration.engines import measure_beside, measure_engine
from bench.calibration.load import OUTPUTS, PROMPTS, Group, Planned, poisson
from bench.calibration.overheads import Lone, fit_overheads
from bench.calibration.page import write_page
from bench.calibration.predict import predict, spec_of
from bench.calibration.results import Row, Seen, as_markdown, rows
from bench.environments import CACHE
from bench.machine import exclusively, origin
from bench.process import busy_s
from bench.shapes import SHAPES
from sim.costs.calibrate import calibrated
from sim.costs.compute import Prefill

_LONE = (64, 256, 512, 1024)  # tokens of prompts that have the cluster alone
_ANSWERS = (1, 16, 40)
_TOGETHER = ((3, 64, 40), (6, 64, 40), (12, 64, 40))  # what a token costs when a step has several
_WARM_UP = 6  # requests of a cluster that are not counted
_BESIDE_S = 3.0

Say = Callable[[str], None]


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shape", default="small", choices=sorted(SHAPES), help="of the model; random weights")
    add("--clusters", default="1P+1D,2P+2D")
    add("--requests", type=int, default=240, help="of a run")
    add("--load", type=float, default=0.4, help="of a prefill worker with a core of its own")
    add("--repeat", type=int, default=2, help="runs of each cluster, of the same requests")
    add("--lone", type=int, default=4, help="requests of each kind that have the cluster alone")
    add("--seed", type=int, default=1)
    add("--calibration", type=Path, metavar="FILE", help="of an earlier run: it is not made anew")
    add("--save", type=Path, metavar="FILE", help="write the calibration there")
    add("--again", type=Path, metavar="RESULT", help="measure nothing: predict its runs anew")
    add("--lock", type=Path, metavar="FILE", help="hold this lock, as flock(1), while measuring")
    add("--json", type=Path, metavar="FILE")
    add("--page", type=Path, metavar="FILE", help="the result as Markdown")
    return parser.parse_args(argv)


async def _calibrate(options: argparse.Namespace, model: Path, say: Say) -> dict[str, Any]:
    """What `calibrated:FILE` reads."""
    cores = available_cpus()
    say("an engine on one core")
    found = await measure_engine(options.shape, cores[0])
    say("two engines on two cores")
    beside = await measure_beside(options.shape, cores[:2], _BESIDE_S)
    draw = random.Random(options.seed + 1000)
    groups = [Group(*one) for one in (*product((1,), _LONE, _ANSWERS), *_TOGETHER)] * options.lone
    draw.shuffle(groups)
    async with serving(model, SHAPES[options.shape].vocab, 1, 1, say) as cluster:
        await cluster.alone(groups[:_WARM_UP], seed=options.seed + 1001)
        say(f"{len(groups)} requests or a few at once, one after the other")
        lone = await cluster.alone(groups, seed=options.seed + 1002)
    return {**found, "lone": [asdict(one) for one in lone], "beside": beside, "cores": len(cores)}


def _with_serving(found: dict[str, Any], place: Path) -> dict[str, Any]:
    """With the overheads that the engine does not explain; `place` then has it as a file."""
    bare = {name: part for name, part in found.items() if name != "serving"}
    place.write_text(json.dumps(bare))
    runner = calibrated(f"calibrated:{place}").runner
    overheads = fit_overheads([Lone(**one) for one in found["lone"]], runner)
    serves = {"cores": found["cores"], "beside": found["beside"], "overheads": asdict(overheads)}
    whole = {**bare, "serving": serves}
    place.write_text(json.dumps(whole))
    return whole


async def _measure(
    options: argparse.Namespace, planned: Sequence[Planned], model: Path, say: Say
) -> dict[str, list[dict[str, Any]]]:
    """By cluster, what became of each run."""
    seen: dict[str, list[dict[str, Any]]] = {}
    for name in options.clusters.split(","):
        counts = [int(count) for count in re.findall(r"\d+", name)]
        vocabulary = SHAPES[options.shape].vocab
        async with serving(model, vocabulary, counts[0], counts[1], say) as cluster:
            warm_up = poisson(4 * _WARM_UP, 4.0, options.seed + 2000)
            await cluster.replay(warm_up, options.seed + 2000)
            for number in range(options.repeat):
                say(f"{name}, run {number + 1}: {planned[-1].at_s:.0f} s")
                run = await _run(cluster, planned, f"{options.seed}-{number}")
                seen.setdefault(name, []).append(run)
    return seen


async def _run(cluster: Cluster, planned: Sequence[Planned], seed: str) -> dict[str, Any]:
    """What clients saw, and CPU seconds by role and of everything else on the machine."""
    cores = range(os.cpu_count() or 1)
    before, busy = cluster.cpu_s(), busy_s(cores)
    outcomes = await cluster.replay(planned, seed)
    used = {role: seconds - before[role] for role, seconds in cluster.cpu_s().items()}
    used["others"] = busy_s(cores) - busy - sum(used.values())
    return Seen.of(outcomes).as_json() | {
        "cpu_s": {role: round(seconds, 3) for role, seconds in used.items()},
        "max_late_s": round(max(outcome.late_s for outcome in outcomes), 6),
        "ttft_parts": await cluster.ttft_parts(seed, len(planned)),
    }


async def _all(options: argparse.Namespace, model: Path, place: Path, say: Say) -> dict[str, Any]:
    async with exclusively(options.lock):
        earlier = _read(options.calibration)
        found = _with_serving(earlier or await _calibrate(options, model, say), place)
        rate = options.load / _mean_prefill_s(options, place)
        planned = poisson(options.requests, rate, options.seed)
        say(f"{options.requests} requests, {rate:.2f} per second")
        seen = await _measure(options, planned, model, say)
    return {
        "calibration": found,
        "rate_per_s": rate,
        "planned": [asdict(one) for one in planned],
        "measured": seen,
    }


def _read(path: Path | None) -> dict[str, Any] | None:
    return None if path is None else dict(json.loads(path.read_text()))


def _mean_prefill_s(options: argparse.Namespace, place: Path) -> float:
    cost = calibrated(f"calibrated:{place}").cost
    return sum(cost.seconds([Prefill(tokens)], []) for tokens in PROMPTS) / len(PROMPTS)


def _predicted(told: dict[str, Any], shape: str, place: Path, say: Say) -> list[Row]:
    """Adds the predictions to the result."""
    planned = [Planned(**one) for one in told["planned"]]
    table: list[Row] = []
    told["predicted"] = {}
    for name, runs in told["measured"].items():
        say(f"{name} in the simulator")
        found, parts = predict(spec_of(name, shape, place), planned)
        told["predicted"][name] = found.as_json() | {"ttft_parts": parts}
        table += rows(name, [Seen.from_json(run) for run in runs], found)
    told["table"] = [{**asdict(row), "error": row.error, "noise": row.noise} for row in table]
    return table


def _model(shape: str) -> Path:
    """Made in a process of its own, whose memory and torch are gone before anything is measured."""
    directory = CACHE / "models"
    subprocess.run(
        [sys.executable, "-m", "bench.models", shape, "--dir", str(directory)],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return directory / shape


def main(argv: Sequence[str]) -> None:
    options = _arguments(argv)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "calibration.json"
        if options.again is not None:
            told = json.loads(options.again.read_text())
            told["calibration"] = _with_serving(told["calibration"], place)
        else:
            told = {
                **origin("calibration", argv),
                "shape": options.shape,
                "prompts": PROMPTS,
                "outputs": OUTPUTS,
            } | asyncio.run(_all(options, _model(options.shape), place, say))
        if options.json is not None:  # what was measured is not lost if a prediction fails
            options.json.write_text(json.dumps(told) + "\n")
        table = _predicted(told, told["shape"], place, say)
        if options.save is not None:
            options.save.write_text(json.dumps(told["calibration"], indent=1) + "\n")
        if options.page is not None:
            worst = calibrated(f"calibrated:{place}").worst
            write_page(options.page, told, table, worst)
    print(as_markdown(table))
    if options.json is not None:
        options.json.write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
