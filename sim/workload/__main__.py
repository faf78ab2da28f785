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
from sim.workload import arrivals, generate
from sim.workload.generate import Lengths, Shape, Talks, Tree
from sim.workload.statistics import Statistics, statistics
from sim.workload.trace import LoadCurve, Request, read_trace, scaled, trace_line

KINDS = {
    "plain": "prompts that share nothing",
    "prefixes": "prompts that begin with shared prefixes: a tree, popularity by Zipf's law",
    "conversations": "turns with think times, each prompt everything said before",
    "shift": "a mix that goes from long prompts and short answers to the opposite",
}
ARRIVALS = ("poisson", "bursts", "diurnal")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "stats":
            _stats(options)
        else:
            _write(_made(options) if options.command == "make" else _rescaled(options))
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
    _add_make(commands.add_parser("make", help="a generated trace", formatter_class=_DEFAULTS))
    scale = commands.add_parser("scale", help="the same trace, changed", formatter_class=_DEFAULTS)
    scale.add_argument("file", type=Path)
    scale.add_argument("--speed", type=_positive, default=1.0, help="times as fast")
    scale.add_argument("--input-scale", type=_positive, default=1.0, help="times the prompts")
    scale.add_argument("--output-scale", type=_positive, default=1.0, help="times the answers")
    scale.add_argument("--load", metavar="S:X,S:X", help="from second S on, X times as fast")
    scale.add_argument("--first", type=int, help="only so many requests")
    return parser


_DEFAULTS = argparse.ArgumentDefaultsHelpFormatter


def _add_make(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("kind", choices=KINDS, help="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()))
    add("--requests", type=int, default=10_000, help="how many")
    add("--rate", type=_positive, default=1.0, help="arrivals per second (of conversations)")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="how they come")
    add("--seed", type=int, default=0, help="everything follows from it")
    add("--input", type=_positive, default=4096, help="mean new tokens of a prompt")
    add("--output", type=_positive, default=256, help="mean tokens of an answer")
    add("--sigma", type=float, default=0.8, help="spread of lengths (of their logarithm)")
    add("--burst-factor", type=_positive, default=5.0, help="bursts: times the calm rate")
    add("--burst-share", type=_positive, default=0.1, help="bursts: share of the time")
    add("--burst-s", type=_positive, default=10.0, help="bursts: mean seconds of one")
    add("--period-s", type=_positive, default=3600.0, help="diurnal: seconds of a day")
    add("--depth", type=float, default=0.8, help="diurnal: swing around the mean rate")
    add("--levels", type=int, default=3, help="prefixes: nodes from root to leaf")
    add("--fan-out", type=int, default=8, help="prefixes: children of a node")
    add("--node-tokens", type=int, default=2048, help="prefixes: tokens of a node")
    add("--zipf", type=float, default=1.0, help="prefixes: exponent of popularity")
    add("--turns", type=_positive, default=4.0, help="conversations: mean turns")
    add("--think-s", type=_positive, default=30.0, help="conversations: mean pause")
    add("--system-tokens", type=int, default=1024, help="conversations: common beginning")
    add("--shift-s", type=_positive, default=600.0, help="shift: half of the way is then done")


def _made(options: argparse.Namespace) -> Iterator[Request]:
    shape = Shape(Lengths(options.input, options.sigma), Lengths(options.output, options.sigma))
    times, seed = _arrivals(options, options.seed), options.seed
    match options.kind:
        case "plain":
            stream = generate.plain(times, shape, seed)
        case "prefixes":
            tree = Tree(options.levels, options.fan_out, options.node_tokens, options.zipf)
            stream = generate.prefixes(times, shape, tree, seed)
        case "conversations":
            talks = Talks(options.turns, options.think_s, system_tokens=options.system_tokens)
            stream = generate.conversations(times, shape, talks, seed)
        case _:
            stream = _shift(options, shape)
    return itertools.islice(stream, options.requests)


def _shift(options: argparse.Namespace, shape: Shape) -> Iterator[Request]:
    """At first all requests have the shape asked for; later prompts have the length that answers
    had, and answers that of prompts."""
    swapped = Shape(shape.output, shape.input)
    streams = [
        generate.faded(
            generate.plain(_arrivals(options, seed), one, seed),
            (options.shift_s * 0.5, options.shift_s * 1.5),
            shares,
            seed,
        )
        for one, shares, seed in (
            (shape, (1.0, 0.0), 2 * options.seed),
            (swapped, (0.0, 1.0), 2 * options.seed + 1),
        )
    ]
    return generate.mixed(*streams)


def _arrivals(options: argparse.Namespace, seed: int) -> Iterator[float]:
    match options.arrivals:
        case "bursts":
            return arrivals.bursts(
                options.rate, seed, options.burst_factor, options.burst_share, options.burst_s
            )
        case "diurnal":
            return arrivals.diurnal(options.rate, seed, options.period_s, options.depth)
        case _:
            return arrivals.poisson(options.rate, seed)


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


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
