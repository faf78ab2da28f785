"""Command-line flags for the fields of a `FleetSpec`, and for the part of a trace to replay."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from baton.errors import ConfigError
from conductor.policies import RoutePolicy
from kvstore.eviction import POLICIES
from sim.costs.machines import MACHINES, machine_of
from sim.costs.models import MODELS
from sim.costs.overheads import OVERHEADS
from sim.fleet.spec import FleetSpec
from sim.workload.make import made, make_options
from sim.workload.trace import LoadCurve, Request, read_trace, scaled

_CHOICES: Mapping[str, list[str]] = {
    "model": list(MODELS),
    "policy": [policy.value for policy in RoutePolicy],
    "eviction": list(POLICIES),
    "overheads": list(OVERHEADS),
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
    "nvme_blocks": "of 512 tokens in each node's NVMe tier; 0: no NVMe tier",
    "eviction": "of the CPU tier",
    "admission": "early rejection by what a worker was given, what decodes now, or is predicted to",
    "local_tokens": "most that a decode worker prefills itself; -1: where costs say so",
    "patience": "seconds for which shorter prompts may overtake one, per second that it takes",
    "chunk_tokens": "prompt tokens of a step of a prefill worker",
    "mixed_tokens": "prompt tokens of a step of a worker that decodes, too",
    "prompts_first": "workers that do both decode only when no prompt can be computed",
    "overheads": "that another engine adds to a step",
    "max_seqs": "that decode together on a worker",
    "deadline_s": "of a request",
}


def add_trace_flags(parser: argparse.ArgumentParser, or_make: bool = False) -> None:
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, help="requests, one JSON object per line")
    if or_make:
        text = "requests that are generated as they come, as in 'prefixes --rate 4'"
        source.add_argument("--make", metavar="WORDS", help=text)
    add("--speed", type=float, default=1.0, help="times as fast as recorded")
    add("--input-scale", type=float, default=1.0, help="times the prompts")
    add("--output-scale", type=float, default=1.0, help="times the answers")
    add("--load", metavar="S:X,S:X", help="from second S on, X times as fast")
    add("--first", type=int, help="only so many requests")


def add_spec_flags(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """One for each field but those, and `--gpu`, which is `--node` in short."""
    add = parser.add_argument
    gpus = ", ".join(node.gpu.name for node in MACHINES.values())
    add(
        "--gpu",
        dest="node",
        type=_node_of,
        default=argparse.SUPPRESS,
        metavar="GPU",
        help=f"a node of eight of these, as --node 8xH200: {gpus}",
    )
    for field in dataclasses.fields(FleetSpec):
        if field.name in without:
            continue
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


def _node_of(gpu: str) -> str:
    try:
        return machine_of(gpu).name
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from error


def spec_of(options: argparse.Namespace, **given: object) -> FleetSpec:
    """What has no flag is `given`. Raises ConfigError."""
    names = [field.name for field in dataclasses.fields(FleetSpec) if field.name not in given]
    return FleetSpec.from_json({name: getattr(options, name) for name in names} | given)


def requests_of(options: argparse.Namespace) -> list[Request]:
    return list(_changed(read_trace(options.trace), options))


def stream_of(options: argparse.Namespace) -> tuple[Iterator[Request], int]:
    """As they come, and how many: of those that are generated, only what runs is in memory."""
    if options.make is None:
        requests = requests_of(options)
        return iter(requests), len(requests)
    make = make_options(options.make)
    count = make.requests if options.first is None else min(make.requests, options.first)
    return _changed(made(make), options), count


def _changed(requests: Iterable[Request], options: argparse.Namespace) -> Iterator[Request]:
    changed = scaled(requests, options.speed, options.input_scale, options.output_scale)
    if options.load:
        changed = LoadCurve.parse(options.load).applied(changed)
    return itertools.islice(changed, options.first)


def workload_of(options: argparse.Namespace, requests: int) -> dict[str, Any]:
    return {
        "trace": options.trace.name if options.trace is not None else options.make,
        "requests": requests,
        "speed": options.speed,
        "input_scale": options.input_scale,
        "output_scale": options.output_scale,
        "load": options.load or "",
    }
