"""Sends requests open loop (at given times) or closed loop (as many at once as given)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from baton.bench.stats import Outcome
from baton.client.http import Client, Prompt
from baton.client.timing import Stopwatch
from baton.errors import BatonError

OnOutcome = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class PromptShape:
    """Prompts of random token ids. `shared_prefix` tokens are the same in all of them.

    Lengths are uniform in [length * (1 - spread), length * (1 + spread)], for prompt and answer.
    """

    input_tokens: int
    output_tokens: int
    vocab_size: int
    shared_prefix: int = 0
    spread: float = 0.0
    seed: int = 0


def make_prompts(shape: PromptShape, count: int) -> list[Prompt]:
    """The same shape (seed included) gives the same prompts. Answers ignore end-of-sequence, so
    every run generates the same number of tokens."""
    generator = random.Random(shape.seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(shape.vocab_size) for _ in range(length))

    def length(mean: int) -> int:
        low, high = round(mean * (1 - shape.spread)), round(mean * (1 + shape.spread))
        return max(1, generator.randint(low, high))

    prefix = tokens(shape.shared_prefix)
    prompts = []
    for _ in range(count):
        input_tokens, output_tokens = length(shape.input_tokens), length(shape.output_tokens)
        prompts.append(
            Prompt(
                prefix + tokens(input_tokens),
                max_tokens=output_tokens,
                options={"temperature": 0.0, "ignore_eos": True, "seed": shape.seed},
            )
        )
    return prompts


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds since the start at which requests of a Poisson process arrive."""
    generator = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += generator.expovariate(rate_per_s)


async def closed_loop(
    client: Client, prompts: Sequence[Prompt], concurrency: int, on_outcome: OnOutcome
) -> list[Outcome]:
    """Keep `concurrency` requests under way until all prompts were sent."""
    clock = asyncio.get_running_loop().time
    start = clock()
    waiting = iter(prompts)
    outcomes: list[Outcome] = []

    async def user() -> None:
        for prompt in waiting:  # one iterator for all users: each prompt is taken once
            outcome = await _ask(client, prompt, start, planned_s=None)
            outcomes.append(outcome)
            on_outcome(outcome)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(prompts))):
            group.create_task(user())
    return outcomes


async def open_loop(
    client: Client, prompts: Sequence[Prompt], arrivals: Iterator[float], on_outcome: OnOutcome
) -> list[Outcome]:
    """Send each prompt at its arrival time, whether or not earlier ones have been answered."""
    clock = asyncio.get_running_loop().time
    start = clock()
    outcomes: list[Outcome] = []

    async def one(prompt: Prompt, planned_s: float) -> None:
        outcome = await _ask(client, prompt, start, planned_s)
        outcomes.append(outcome)
        on_outcome(outcome)

    async with asyncio.TaskGroup() as group:
        for prompt, planned_s in zip(prompts, arrivals, strict=False):
            await asyncio.sleep(max(0.0, start + planned_s - clock()))
            group.create_task(one(prompt, planned_s))
    return outcomes


async def _ask(client: Client, prompt: Prompt, start: float, planned_s: float | None) -> Outcome:
    clock = asyncio.get_running_loop().time
    started_s = clock() - start
    late_s = 0.0 if planned_s is None else started_s - planned_s
    watch = Stopwatch()
    try:
        async with aclosing(watch.watch(client.stream(prompt))) as pieces:
            async for _ in pieces:
                pass
    except BatonError as error:
        return Outcome(started_s, clock() - start, error=error.message, late_s=late_s)
    return Outcome(started_s, clock() - start, timing=watch.timing, late_s=late_s)
