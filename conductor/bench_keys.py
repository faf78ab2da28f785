"""What comes before the prefix map: block keys of a prompt, and the ring that groups hash to."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from functools import partial

import numpy as np

from baton.bench.stats import percentile
from baton.hashing import block_keys, root_key
from conductor.bench_figures import Figure, Plan, latencies, timed
from conductor.ring import Ring

ROUNDS = 50
GROUPS = 20_000
LEAVERS = 10


def measure_hashing(plan: Plan) -> Iterator[Figure]:
    """`block_keys` of a prompt that was tokenized to a tuple, and to an array."""
    random = np.random.default_rng(plan.seed)
    prompt = tuple(random.integers(0, 150_000, plan.prompt_tokens).tolist())
    root = root_key("benchmark", "bfloat16", plan.block_size)
    for kind, tokens in (("a tuple", prompt), ("an array", array("I", prompt))):
        samples = timed([partial(block_keys, root, tokens, plan.block_size)] * ROUNDS)
        median = percentile(samples, 50)
        name = f"block keys from {kind}"
        yield Figure("hashing", name, plan.prompt_tokens / median / 1e6, "M tokens/s")
        yield Figure("hashing", f"{name}, {plan.prompt_tokens} tokens", median * 1e6, "µs")


def measure_ring(plan: Plan) -> Iterator[Figure]:
    names = [f"worker-{number}" for number in range(plan.workers)]
    (seconds,) = timed([lambda: Ring.of(names)])
    yield Figure("ring", f"ring of {plan.workers}", seconds * 1e6, "µs")
    ring = Ring.of(names)
    groups = [f"group {number}".encode() for number in range(GROUPS)]
    samples = timed(partial(ring.owners, group, 2) for group in groups)
    yield from latencies("ring", "two owners of a group", samples, "")
    loads = dict.fromkeys(names, 1.0)
    samples = timed(partial(ring.choose, group, loads) for group in groups[:1000])
    yield from latencies("ring", "choose with bounded loads", samples, "")
    leavers = names[:: max(len(names) // LEAVERS, 1)]
    samples = timed(partial(ring.without, name) for name in leavers)
    yield Figure("ring", "without a worker, slowest", samples[-1] * 1e6, "µs")
    yield from _moved(Ring.of(names[:100]), groups)


def _moved(ring: Ring, groups: list[bytes]) -> Iterator[Figure]:
    """Keys that change their owner when one of (up to) 100 workers leaves, as a share of K/N."""
    before = [ring.owners(group, 1) for group in groups]
    moved = []
    for name in list(ring.shares())[:LEAVERS]:
        after = ring.without(name)
        pairs = zip(groups, before, strict=True)
        moved.append(sum(after.owners(group, 1) != owner for group, owner in pairs))
    fair = len(groups) / len(ring)
    mean = sum(moved) / len(moved)
    name = f"keys moved when one of {len(ring)} leaves, of K/N"
    yield Figure("ring", name, mean / fair, "", "<= 1.1")
    largest = max(ring.shares().values()) * len(ring)
    yield Figure("ring", "the same, for the largest arcs", largest, "", "<= 1.1")
