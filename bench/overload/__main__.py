"""`python -m bench.overload`: `baton serve`, ten times what it can do, and what is left of it.

Capacity is what a closed loop gets answered. Then come, open loop: half of it, all of it, ten
times, and half of it again. Goodput counts answers that kept both SLOs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import orjson

from baton.bench.stats import Slo
from baton.client.http import Client
from bench.machine import exclusively, origin
from bench.overload.client import Phase, Plan, Sent
from bench.overload.figures import (
    Look,
    PhaseFigures,
    answer_cpu_s,
    as_markdown,
    figures,
    rejection_cpu_s,
)
from bench.served import served

_LOOK_S = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.overload",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--times", type=float, default=10.0, help="of the capacity")
    add("--seconds", type=float, default=30.0, help="of overload")
    add("--prompt-tokens", type=int, default=512)
    add("--output-tokens", type=int, default=32)
    add("--slo-ttft-ms", type=float, default=2000.0)
    add("--slo-tpot-ms", type=float, default=150.0)
    add("--serve", default="", metavar="FLAGS", help="more flags of baton serve")
    add("--unprotected", action="store_true", help="the cluster is not told the SLOs")
    add("--seed", type=int, default=0)
    add("--lock", type=Path, metavar="FILE", help="hold this lock, as flock(1), while measuring")
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    flags = ["--prefill", "1", "--decode", "1", "--dtype", "float32", *shlex.split(options.serve)]
    if not options.unprotected:
        flags += ["--slo-ttft-ms", str(options.slo_ttft_ms)]
        flags += ["--slo-tpot-ms", str(options.slo_tpot_ms)]
    slo = Slo(options.slo_ttft_ms / 1e3, options.slo_tpot_ms / 1e3)
    async with served(flags) as event:
        address, model = event["http"], event["model"]
        async with Client(address) as client:
            pids = _pids(await client.cluster())
        plan = Plan(address, model, options.prompt_tokens, options.output_tokens, options.seed, ())
        await _send(plan, Phase("warm-up", 5.0, at_once=4))
        async with exclusively(options.lock):
            # Enough at once to keep both workers busy, and not so much that SLOs turn any away.
            closed = await _send(plan, Phase("capacity", 10.0, at_once=8))
            capacity = sum(s.status == 200 for s in closed["capacity"][1]) / 10.0
            phases = (
                Phase("nothing", 4.0),
                Phase("half, before", 10.0, capacity / 2),
                Phase("capacity", 12.0, capacity),
                Phase(f"{options.times:g} ×", options.seconds, capacity * options.times),
                Phase("half, after", 10.0, capacity / 2),
            )
            looks: list[Look] = []
            looking = asyncio.create_task(_look(pids, looks))
            try:
                told = await _send(replace(plan, seed=plan.seed + 1), *phases)
            finally:
                looking.cancel()
                with suppress(asyncio.CancelledError):
                    await looking
    made = [
        figures(phase.name, *_part(told[phase.name], phase), options.output_tokens, slo, looks)
        for phase in phases
    ]
    began, sent = told[phases[-1].name]
    first = [each for each in sent if each.at < began + 5.0]
    after = figures("half, the first 5 s after", began, 5.0, first, options.output_tokens, slo,
                    looks)  # fmt: skip
    return {"capacity_per_s": capacity} | _told([*made, after])


def _part(told: tuple[float, list[Sent]], phase: Phase) -> tuple[float, float, list[Sent]]:
    return told[0], phase.seconds, told[1]


def _told(made: Sequence[PhaseFigures]) -> dict[str, Any]:
    idle, half, full, over = made[:4]
    return {
        "phases": [asdict(each) for each in made],
        "goodput_to_peak": round(
            over.goodput_per_s / max(half.goodput_per_s, full.goodput_per_s, 1e-9), 3
        ),
        "answer_cpu_ms": round(answer_cpu_s(idle, half) * 1e3, 3),
        "rejection_cpu_ms": round(rejection_cpu_s(idle, half, over) * 1e3, 3),
    }


async def _send(plan: Plan, *phases: Phase) -> dict[str, tuple[float, list[Sent]]]:
    """By phase: when it began, and its requests."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.overload.client"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    given = orjson.dumps(asdict(replace(plan, phases=phases)))
    out, _ = await process.communicate(given)
    if process.returncode:
        raise SystemExit("the client failed")
    told = orjson.loads(out)
    return {
        name: (part["began"], [Sent(*each) for each in part["sent"]]) for name, part in told.items()
    }


def _pids(cluster: Mapping[str, Any]) -> dict[str, int]:
    """By name, the conductor's first."""
    processes = (cluster["conductors"][0], *cluster["workers"])
    return {str(process["name"]): int(process["pid"]) for process in processes}


async def _look(pids: Mapping[str, int], looks: list[Look]) -> None:
    """Until cancelled."""
    while True:
        stats = {name: _stat(pid) for name, pid in pids.items()}
        conductor = next(iter(stats.values()))
        cpu_s = (int(conductor[11]) + int(conductor[12])) / _TICKS
        rss_mib = {name: int(stat[21]) * _PAGE_MIB for name, stat in stats.items()}
        looks.append(Look(time.perf_counter(), cpu_s, rss_mib))
        await asyncio.sleep(_LOOK_S)


def _stat(pid: int) -> list[str]:
    """The fields after the command's name: proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def main(argv: Sequence[str]) -> None:
    options = _arguments(argv)
    told = origin("overload", argv) | asyncio.run(_measure(options))
    print(f"capacity {told['capacity_per_s']:.1f} requests/s")
    print(as_markdown(told["phases"]))
    print(f"goodput at {options.times:g} × / peak: {told['goodput_to_peak']:.0%}")
    print(f"CPU time of the conductor: {told['answer_cpu_ms']:.2f} ms for an answer, "
          f"{told['rejection_cpu_ms']:.2f} ms for a rejection")  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
