"""What is in a trace: lengths, arrivals, and how much of its prompts a cache could have had."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from baton.bench.stats import Distribution, distribution
from sim.workload.trace import BLOCK_TOKENS, Request


@dataclass(frozen=True, slots=True)
class CacheShare:
    """Share of all prompt blocks that a cache of so many blocks (None: without bounds) finds."""

    capacity_blocks: int | None
    hit_share: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """`rate` is in requests per second; `peak_rate` that of the busiest minute. `caches` count all
    blocks as Mooncake does, `full_hit_share` those that are full: a partial one is equal only when
    the whole prompt is."""

    requests: int
    duration_s: float
    rate: float
    peak_rate: float
    input_tokens: Distribution
    output_tokens: Distribution
    total_input_tokens: int
    total_output_tokens: int
    distinct_blocks: int
    full_hit_share: float
    caches: tuple[CacheShare, ...]


def statistics(
    requests: Sequence[Request], capacities: Sequence[int] = (1_000, 10_000, 50_000, 100_000)
) -> Statistics:
    """Raises ValueError when there are no requests."""
    if not requests:
        raise ValueError("no requests")
    duration_s = requests[-1].at_s - requests[0].at_s
    minutes = Counter(int((request.at_s - requests[0].at_s) // 60) for request in requests)
    inputs = [request.input_tokens for request in requests]
    outputs = [request.output_tokens for request in requests]
    hits, full_hits, full, distinct = _infinite_cache(requests)
    blocks = sum(len(request.blocks) for request in requests)
    return Statistics(
        requests=len(requests),
        duration_s=duration_s,
        rate=len(requests) / duration_s if duration_s else 0.0,
        peak_rate=max(minutes.values()) / min(60.0, duration_s) if duration_s else 0.0,
        input_tokens=distribution(inputs),
        output_tokens=distribution(outputs),
        total_input_tokens=sum(inputs),
        total_output_tokens=sum(outputs),
        distinct_blocks=distinct,
        full_hit_share=full_hits / full if full else 0.0,
        caches=(
            *(
                CacheShare(capacity, lru_hits(requests, capacity) / blocks)
                for capacity in capacities
            ),
            CacheShare(None, hits / blocks),
        ),
    )


def _infinite_cache(requests: Sequence[Request]) -> tuple[int, int, int, int]:
    """Hits; hits of full blocks; full blocks; different blocks."""
    seen: set[int] = set()
    hits = full_hits = full = 0
    for request in requests:
        whole = request.input_tokens // BLOCK_TOKENS
        for number, block in enumerate(request.blocks):
            found = block in seen
            hits += found
            if number < whole:
                full += 1
                full_hits += found
        seen.update(request.blocks)
    return hits, full_hits, full, len(seen)


def lru_hits(requests: Sequence[Request], capacity: int) -> int:
    """Prompt blocks that are found by one cache for all requests, which drops the least recently
    used block when it has more than `capacity`."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for request in requests:
        for block in request.blocks:
            if block in cache:
                hits += 1
                cache.move_to_end(block)
                continue
            cache[block] = None
            if len(cache) > capacity:
                cache.popitem(last=False)
    return hits
