"""`python -m sim.fleet --trace FILE --cluster 8P+8D`: replay a trace in virtual time."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from baton.errors import ConfigError
from conductor.policies import RoutePolicy
from kvstore.eviction import POLICIES
from sim.costs.machines import MACHINES
from sim.costs.models import MODELS
from sim.fleet.result import Result, encode, write_result
from sim.fleet.run import SAMPLE_S, simulate
from sim.fleet.spec import FleetSpec
from sim.report.page import report
from sim.report.view import View
from sim.workload.trace import LoadCurve, Request, read_trace, scaled

_PROG = "python -m sim.fleet"
_CHOICES: Mapping[str, list[str]] = {
    "model": list(MODELS),
    "policy": [policy.value for policy in RoutePolicy],
    "eviction": list(POLICIES),
}
_HELP = {
    "cluster": "nP+mD: disaggregated; nM: each worker computes prompts and decodes",
    "node": f"{', '.join(MACHINES)}, or calibrated:FILE of baton bench engine",
    "network_gbps": "of the NICs of a node together; 0: what the node has",
    "tensor_parallel": "GPUs of a worker; 0: all of its node",
    "elastic": "the planner of the conductor changes workers' roles with the load",
    "grain": "tokens that one simulated unit stands for",
    "cache": "KV of earlier prompts: none, each node its own, or read from every node",
    "kv_blocks": "of 512 tokens in a worker's pool; 0: what the node has room for",
    "store_blocks": "of 512 tokens in each node's CPU tier; 0: no CPU tier",
    "eviction": "of the CPU tier",
    "admission": "early rejection by what a worker was given, what decodes now, or is predicted to",
    "local_tokens": "most that a decode worker prefills itself; -1: where costs say so",
    "chunk_tokens": "prompt tokens of a step of a prefill worker",
    "mixed_tokens": "prompt tokens of a step that decodes, too",
    "max_seqs": "that decode together on a worker",
    "deadline_s": "of a request",
}
PROGRESS_S = 0.5  # of real time, between looks at the line


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _check_places(options)
        spec = _spec(options)
        requests = _requests(options)
        began, line = time.monotonic(), _Line(len(requests))
        result = simulate(
            spec, iter(requests), _workload(options, requests), line.update, options.sample_s
        )
        line.end(time.monotonic() - began)
        _deliver(result, options)
    except ConfigError as error:
        sys.exit(f"{_PROG}: {error.message}")
    return 0


def _check_places(options: argparse.Namespace) -> None:
    """Before the work, not after it."""
    for place in (options.json, options.report):
        if place and not Path(place).parent.is_dir():
            raise ConfigError(f"there is no directory for {place}")


def _deliver(result: Result, options: argparse.Namespace) -> None:
    if options.report:
        label = options.report.name.removesuffix(".html")
        options.report.write_text(report(View(result, label)), encoding="utf-8")
    if options.json == "-":
        sys.stdout.buffer.write(encode(result))
        return
    if options.json:
        write_result(result, Path(options.json))
    sys.stdout.write(_summary(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="requests, one JSON object per line")
    add("--speed", type=float, default=1.0, help="times as fast as recorded")
    add("--input-scale", type=float, default=1.0, help="times the prompts")
    add("--output-scale", type=float, default=1.0, help="times the answers")
    add("--load", metavar="S:X,S:X", help="from second S on, X times as fast")
    add("--first", type=int, help="only so many requests")
    add("--sample-s", type=float, default=SAMPLE_S, help="between samples of workers and links")
    add("--json", metavar="FILE", help="the result; packed if it ends in .gz; - = stdout")
    add("--report", type=Path, metavar="FILE", help="the result as an HTML page")
    for field in dataclasses.fields(FleetSpec):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        if default is dataclasses.MISSING:
            add(flag, required=True, help=_HELP[field.name])
        elif isinstance(default, bool):
            add(flag, action="store_true", help=_HELP[field.name])
        elif isinstance(default, StrEnum):
            names = [choice.value for choice in type(default)]
            add(flag, choices=names, default=default.value, help=_HELP[field.name])
        else:
            told: dict[str, Any] = {"help": _HELP.get(field.name, " ")}
            add(flag, type=type(default), default=default, choices=_CHOICES.get(field.name), **told)
    return parser


def _spec(options: argparse.Namespace) -> FleetSpec:
    names = [field.name for field in dataclasses.fields(FleetSpec)]
    return FleetSpec.from_json({name: getattr(options, name) for name in names})


def _requests(options: argparse.Namespace) -> list[Request]:
    requests: Iterator[Request] = scaled(
        read_trace(options.trace), options.speed, options.input_scale, options.output_scale
    )
    if options.load:
        requests = LoadCurve.parse(options.load).applied(requests)
    return list(itertools.islice(requests, options.first))


def _workload(options: argparse.Namespace, requests: list[Request]) -> dict[str, Any]:
    return {
        "trace": options.trace.name,
        "requests": len(requests),
        "speed": options.speed,
        "input_scale": options.input_scale,
        "output_scale": options.output_scale,
        "load": options.load or "",
    }


class _Line:
    """How far it is, on standard error, if somebody is there to see it."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._next = 0.0
        self._shown = sys.stderr.isatty()

    def update(self, ended: int, now: float) -> None:
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PROGRESS_S
        done = 30 * ended // max(self._total, 1)
        bar = "#" * done + "." * (30 - done)
        sys.stderr.write(f"\r[{bar}] {ended:,} of {self._total:,} requests, {now:,.0f} s simulated")
        sys.stderr.flush()

    def end(self, seconds: float) -> None:
        sys.stderr.write(f"{chr(10) if self._shown else ''}simulated in {seconds:.1f} s\n")


def _summary(result: Result) -> str:
    told = result.totals
    rows = [
        ("requests", ", ".join(f"{count:,} {code}" for code, count in told["codes"].items())),
        ("within the SLOs", f"{told['good_share']:.2%}, {told['goodput_per_s']:.3f} per second"),
        ("prompt tokens from caches", f"{told['cached_share']:.2%}"),
    ]
    for name, label in (("ttft_s", "TTFT"), ("tbt_mean_s", "mean TBT"), ("tbt_p90_s", "p90 TBT")):
        parts = [f"{key} {_ms(value)}" for key, value in told[name].items()]
        rows.append((label, ", ".join(parts)))
    busy = f"prefill {told['prefill_busy_s']:,.0f} s, decode {told['decode_busy_s']:,.0f} s"
    rows.append(("busy", busy))
    return "".join(f"{label:<28}{value}\n" for label, value in rows)


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
