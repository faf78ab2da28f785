"""What the clusters are asked: the same requests for the real one and for the simulated one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.client import Ask
from bench.shapes import FIRST_WORD
from sim.fleet.prompts import BLOCK_TOKENS
from sim.workload.trace import Request

PROMPTS = (128, 256, 512, 1024)  # tokens, equally often
OUTPUTS = (8, 24, 48)


@dataclass(frozen=True, slots=True)
class Planned:
    """A request that arrives `at_s` seconds after the beginning of a run."""

    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True, slots=True)
class Group:
    """So many equal requests that come at once."""

    together: int
    prompt: int
    output: int


def poisson(requests: int, rate_per_s: float, seed: int) -> list[Planned]:
    draw = random.Random(seed)
    at_s, planned = 0.0, []
    for _ in range(requests):
        at_s += draw.expovariate(rate_per_s)
        planned.append(Planned(at_s, draw.choice(PROMPTS), draw.choice(OUTPUTS)))
    return planned


def asks(planned: Sequence[Planned], vocabulary: int, seed: object) -> list[Ask]:
    """Random tokens: nothing is in any cache. Requests are called as `name_of` says."""
    draw = random.Random(f"prompts {seed}")
    words = range(FIRST_WORD, vocabulary)
    return [
        Ask(tuple(draw.choices(words, k=one.prompt)), one.output, name_of(seed, number))
        for number, one in enumerate(planned)
    ]


def name_of(seed: object, number: int) -> str:
    return f"{seed}-{number}"


def requests(planned: Sequence[Planned]) -> list[Request]:
    """The same for the simulator."""
    blocks = iter(range(1 << 30))
    return [
        Request(
            one.at_s,
            one.prompt,
            one.output,
            tuple(next(blocks) for _ in range(0, one.prompt, BLOCK_TOKENS)),
        )
        for one in planned
    ]
