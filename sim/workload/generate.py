"""Generated traces: endless streams of requests in order of arrival, each made from a seed.

Streams of different shapes are put together with `mixed`; `faded` changes a stream's share of a mix
as time goes on. The same arguments give the same requests.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sim.workload.trace import BLOCK_TOKENS, Request, blocks_of


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens, from a log-normal distribution with this mean, cut to 1..`most`. `sigma` is the
    deviation of the logarithm: 0 is always the mean, 1 a tail as in conversations."""

    mean: float
    sigma: float = 0.0
    most: int = 131_072

    def draw(self, generator: random.Random) -> int:
        drawn = self.mean * math.exp(self.sigma * generator.gauss() - self.sigma**2 / 2)
        return min(self.most, max(1, round(drawn)))


@dataclass(frozen=True, slots=True)
class Shape:
    """New tokens of a prompt (after what it shares with others), and tokens of its answer."""

    input: Lengths
    output: Lengths


def plain(arrivals: Iterable[float], shape: Shape, seed: int) -> Iterator[Request]:
    """Prompts that share nothing."""
    generator = random.Random(f"plain/{seed}")
    ids = itertools.count()
    for at_s in arrivals:
        tokens, output = shape.input.draw(generator), shape.output.draw(generator)
        yield Request(at_s, tokens, output, _chain((), tokens, ids))


@dataclass(frozen=True, slots=True)
class Tree:
    """Shared prefixes: every node is `node_tokens` of text that follows its parent's, `depth` nodes
    from a root to a leaf, `fan_out` children of each and as many roots. Children are chosen by
    Zipf's law: the k-th most popular one in proportion to `1 / k ** zipf`."""

    depth: int = 3
    fan_out: int = 8
    node_tokens: int = 2048
    zipf: float = 1.0


def prefixes(arrivals: Iterable[float], shape: Shape, tree: Tree, seed: int) -> Iterator[Request]:
    """Every prompt begins with the path to a leaf of the tree, as far as its whole blocks go."""
    generator = random.Random(f"prefixes/{seed}")
    ids = itertools.count()
    weights = list(itertools.accumulate(1 / rank**tree.zipf for rank in range(1, tree.fan_out + 1)))
    known: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}  # blocks by path from the root
    for at_s in arrivals:
        path: tuple[int, ...] = ()
        for level in range(1, tree.depth + 1):
            parent = known[path]
            path = (*path, *generator.choices(range(tree.fan_out), cum_weights=weights))
            if path not in known:
                new = level * tree.node_tokens // BLOCK_TOKENS - len(parent)
                known[path] = (*parent, *itertools.islice(ids, new))
        tokens = tree.depth * tree.node_tokens + shape.input.draw(generator)
        output = shape.output.draw(generator)
        yield Request(at_s, tokens, output, _chain(known[path], tokens, ids))


@dataclass(frozen=True, slots=True)
class Talks:
    """Conversations: `turns` on average (geometric), which begin with one of `system_prompts`
    texts of `system_tokens`; between turns `think_s` pass (exponential), after an answer that took
    `answer_s_per_token`. A conversation ends before its prompt would be over `most_tokens`."""

    turns: float = 4.0
    think_s: float = 30.0
    answer_s_per_token: float = 0.05
    system_tokens: int = 1024
    system_prompts: int = 1
    most_tokens: int = 131_072


def conversations(
    arrivals: Iterable[float], shape: Shape, talks: Talks, seed: int
) -> Iterator[Request]:
    """`arrivals` are of conversations; each turn's prompt is everything said before, answers
    included, and new text. An open loop: a slow cluster does not delay the next turn."""
    generator = random.Random(f"conversations/{seed}")
    ids = itertools.count()
    system = [
        tuple(itertools.islice(ids, talks.system_tokens // BLOCK_TOKENS))
        for _ in range(talks.system_prompts)
    ]
    later: list[tuple[float, int, Request]] = []  # turns to come, of conversations that have begun
    numbers = itertools.count()  # turns at one time keep their order
    for at_s in arrivals:
        while later and later[0][0] <= at_s:
            yield heapq.heappop(later)[2]
        for turn in _talk(at_s, generator.choice(system), shape, talks, ids, generator):
            heapq.heappush(later, (turn.at_s, next(numbers), turn))
    while later:
        yield heapq.heappop(later)[2]


def _talk(
    at_s: float,
    blocks: tuple[int, ...],
    shape: Shape,
    talks: Talks,
    ids: Iterator[int],
    generator: random.Random,
) -> Iterator[Request]:
    said = talks.system_tokens
    while True:
        tokens, output = said + shape.input.draw(generator), shape.output.draw(generator)
        if tokens > talks.most_tokens:
            return
        blocks = _chain(blocks, tokens, ids)
        yield Request(at_s, tokens, output, blocks)
        if generator.random() < 1 / talks.turns:
            return
        blocks = blocks[: tokens // BLOCK_TOKENS]
        said = tokens + output
        at_s += output * talks.answer_s_per_token + generator.expovariate(1 / talks.think_s)


def mixed(*streams: Iterable[Request]) -> Iterator[Request]:
    """All requests of all streams in order of arrival. Streams share no blocks."""

    def apart(number: int, stream: Iterable[Request]) -> Iterator[Request]:
        for request in stream:
            blocks = tuple(block * len(streams) + number for block in request.blocks)
            yield replace(request, blocks=blocks)

    return heapq.merge(
        *(apart(number, stream) for number, stream in enumerate(streams)),
        key=lambda request: request.at_s,
    )


def faded(
    stream: Iterable[Request], times: Sequence[float], shares: Sequence[float], seed: int
) -> Iterator[Request]:
    """Part of a stream: each request stays with the probability that belongs to its time, which
    goes in straight lines through `shares` at `times` (ascending), level before and after. It ends
    when nothing more of it would stay."""
    generator = random.Random(f"faded/{seed}")
    for request in stream:
        if request.at_s > times[-1] and not shares[-1]:
            return
        if generator.random() < _level(request.at_s, times, shares):
            yield request


def _level(at_s: float, times: Sequence[float], shares: Sequence[float]) -> float:
    if at_s <= times[0]:
        return shares[0]
    for (begin, low), (end, high) in itertools.pairwise(zip(times, shares, strict=True)):
        if at_s <= end:
            return low + (high - low) * (at_s - begin) / (end - begin)
    return shares[-1]


def _chain(shared: tuple[int, ...], tokens: int, ids: Iterator[int]) -> tuple[int, ...]:
    """Blocks of a prompt that begins with `shared` (whole blocks), and goes on like no other."""
    return (*shared, *itertools.islice(ids, blocks_of(tokens) - len(shared)))
