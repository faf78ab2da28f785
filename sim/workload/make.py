"""Generated traces: the flags of `baton sim workload make`, and the requests they ask for."""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Iterator

from sim.workload import arrivals, generate
from sim.workload.generate import Lengths, Shape, Talks, Tree
from sim.workload.trace import Request

KINDS = {
    "plain": "prompts that share nothing",
    "prefixes": "prompts that begin with shared prefixes: a tree, popularity by Zipf's law",
    "conversations": "turns with think times, each prompt everything said before",
    "shift": "a mix that goes from long prompts and short answers to the opposite",
}
ARRIVALS = ("poisson", "bursts", "diurnal")


def made_by(words: str) -> Iterator[Request]:
    """What `baton sim workload make` writes, as in `prefixes --rate 4`."""
    return made(make_options(words))


def make_options(words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make")
    add_make_flags(parser)
    return parser.parse_args(shlex.split(words))


def add_make_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("kind", choices=KINDS, help="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()))
    add("--requests", type=int, default=10_000, help="how many")
    add("--rate", type=positive, default=1.0, help="arrivals per second (of conversations)")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="how they come")
    add("--seed", type=int, default=0, help="everything follows from it")
    add("--input", type=positive, default=4096, help="mean new tokens of a prompt")
    add("--output", type=positive, default=256, help="mean tokens of an answer")
    add("--sigma", type=float, default=0.8, help="spread of lengths (of their logarithm)")
    add("--burst-factor", type=positive, default=5.0, help="bursts: times the calm rate")
    add("--burst-share", type=positive, default=0.1, help="bursts: share of the time")
    add("--burst-s", type=positive, default=10.0, help="bursts: mean seconds of one")
    add("--period-s", type=positive, default=3600.0, help="diurnal: seconds of a day")
    add("--depth", type=float, default=0.8, help="diurnal: swing around the mean rate")
    add("--levels", type=int, default=3, help="prefixes: nodes from root to leaf")
    add("--fan-out", type=int, default=8, help="prefixes: children of a node")
    add("--node-tokens", type=int, default=2048, help="prefixes: tokens of a node")
    add("--zipf", type=float, default=1.0, help="prefixes: exponent of popularity")
    add("--turns", type=positive, default=4.0, help="conversations: mean turns")
    add("--think-s", type=positive, default=30.0, help="conversations: mean pause")
    add("--system-tokens", type=int, default=1024, help="conversations: common beginning")
    add("--shift-s", type=positive, default=600.0, help="shift: half of the way is then done")


def made(options: argparse.Namespace) -> Iterator[Request]:
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


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
