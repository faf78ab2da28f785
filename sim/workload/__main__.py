"""`python -m sim.workload`: what is in a trace, and traces made to measure.

stats FILE     lengths, arrivals, and the share of prompt blocks that caches would hit
make KIND      a generated trace, on standard output
scale FILE     the same trace faster, longer, shorter, or with load that changes
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import orjson

from baton.errors import ConfigError
from sim.workload.make import add_make_flags, made, positive
from sim.workload.statistics import Statistics, statistics
from sim.workload.trace import LoadCurve, Request, read_trace, scaled, trace_line


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "stats":
            _stats(options)
        else:
            _write(made(options) if options.command == "make" else _rescaled(options))
    except ConfigError as error:
        sys.exit(f"{_PROG}: {error.message}")
    except BrokenPipeError:  # whoever read our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


_PROG = "python -m sim.workload"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("stats", help="what is in a trace")
    show.add_argument("file", type=Path)
    show.add_argument("--json", action="store_true", help="one object instead of a table")
    show.add_argument(
        "--capacity",
        type=_capacities,
        default=(1_000, 10_000, 50_000, 100_000),
        metavar="N,N",
        help="blocks of the LRU caches",
    )
    add_make_flags(commands.add_parser("make", help="a generated trace", formatter_class=_DEFAULTS))
    scale = commands.add_parser("scale", help="the same trace, changed", formatter_class=_DEFAULTS)
    scale.add_argument("file", type=Path)
    scale.add_argument("--speed", type=positive, default=1.0, help="times as fast")
    scale.add_argument("--input-scale", type=positive, default=1.0, help="times the prompts")
    scale.add_argument("--output-scale", type=positive, default=1.0, help="times the answers")
    scale.add_argument("--load", metavar="S:X,S:X", help="from second S on, X times as fast")
    scale.add_argument("--first", type=int, help="only so many requests")
    return parser


_DEFAULTS = argparse.ArgumentDefaultsHelpFormatter


def _rescaled(options: argparse.Namespace) -> Iterator[Request]:
    requests: Iterable[Request] = read_trace(options.file)
    changed = scaled(requests, options.speed, options.input_scale, options.output_scale)
    if options.load:
        changed = LoadCurve.parse(options.load).applied(changed)
    return itertools.islice(changed, options.first)


def _write(requests: Iterable[Request]) -> None:
    for request in requests:
        sys.stdout.buffer.write(trace_line(request))
    sys.stdout.flush()


def _stats(options: argparse.Namespace) -> None:
    found = statistics(read_trace(options.file), options.capacity)
    if options.json:
        sys.stdout.write(orjson.dumps(dataclasses.asdict(found)).decode() + "\n")
    else:
        sys.stdout.write("".join(f"{label:<28}{value}\n" for label, value in _rows(found)))


def _rows(found: Statistics) -> Iterator[tuple[str, str]]:
    yield "requests", f"{found.requests:,}"
    yield "duration", f"{found.duration_s:,.0f} s"
    yield "requests per second", f"{found.rate:.2f} (busiest minute {found.peak_rate:.2f})"
    for label, tokens in (("prompt", found.input_tokens), ("answer", found.output_tokens)):
        parts = [f"{name} {getattr(tokens, name):,.0f}" for name in ("mean", "p50", "p90", "p99")]
        yield f"{label} tokens", f"{', '.join(parts)}, max {tokens.max:,.0f}"
    yield "different blocks", f"{found.distinct_blocks:,} of 512 tokens"
    for cache in found.caches:
        size = "infinite" if cache.capacity_blocks is None else f"{cache.capacity_blocks:,} blocks"
        yield f"hits, {size} (LRU)", f"{cache.hit_share:.2%} of prompt blocks"
    yield "hits, infinite, full blocks", f"{found.full_hit_share:.2%} of full prompt blocks"


def _capacities(text: str) -> Sequence[int]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
