"""Caches of nodes and of the cluster, by capacity and eviction."""

from __future__ import annotations

from dataclasses import replace

from sim.fleet.spec import Cache, FleetSpec
from sim.results.experiments.common import CACHED, DRAM_BLOCKS, GPU_S, cached, per_request
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.runs import ONE_TOKEN, Outcome, Replay
from sim.workload.statistics import lru_hits
from sim.workload.trace import BLOCK_TOKENS

NODES = 10  # that compute prompts, as in FAST'25
POOL_BLOCKS = 256  # of a node's GPUs: room for the longest prompt
_MOST = NODES * (POOL_BLOCKS + DRAM_BLOCKS)


def _row(blocks: int, cache: Cache, eviction: str, published: dict[str, float]) -> Row:
    """`blocks`: of all nodes together."""
    spec = FleetSpec(
        f"{NODES}P+1D",
        cache=cache,
        eviction=eviction,
        kv_blocks=POOL_BLOCKS,
        store_blocks=blocks // NODES - POOL_BLOCKS,
    )
    return Row(f"{blocks:,} blocks, {cache}, {eviction}", spec, published)


def _one_lru(outcome: Outcome) -> float:
    """What one LRU cache with the blocks of all nodes finds of full blocks: percent of tokens."""
    spec, requests = outcome.run.spec, outcome.requests
    full = [replace(r, blocks=r.blocks[: r.input_tokens // BLOCK_TOKENS]) for r in requests]
    hits = lru_hits(full, spec.prefill * (spec.kv_blocks + spec.store_blocks))
    return 100 * hits * BLOCK_TOKENS / sum(request.input_tokens for request in requests)


CACHES = Experiment(
    "caches",
    "Caches: global against local, by capacity and eviction",
    f"{NODES} prefill nodes, answers of one token. Blocks of 512 tokens are those of all nodes: "
    f"{POOL_BLOCKS} in the GPUs of each, room for the longest prompt, the others in its CPU tier, "
    "of which the eviction is. Next to them what one LRU cache of as many blocks finds, in the "
    "order of arrival. Published, with 3M tokens per node: FAST'25, figure 10.",
    (
        Column(CACHED, cached, "{:.1f} %"),
        Column("one LRU cache", _one_lru, "{:.1f} %"),
        Column(GPU_S, per_request("prefill_busy_s"), "{:.3f} s"),
    ),
    (
        _row(_MOST, Cache.GLOBAL, "lru", {CACHED: 37.5, GPU_S: 1.051}),
        _row(_MOST, Cache.LOCAL, "lru", {CACHED: 16.9, GPU_S: 1.379}),
        _row(20_000, Cache.GLOBAL, "lru", {}),
        _row(20_000, Cache.LOCAL, "lru", {}),
        *(
            _row(blocks, cache, eviction, {})
            for blocks in (10_000, 5_000)
            for cache, eviction in (
                (Cache.GLOBAL, "lru"),
                (Cache.GLOBAL, "lfu"),
                (Cache.GLOBAL, "length_aware"),
                (Cache.LOCAL, "lru"),
            )
        ),
    ),
    Replay(first=300, output_scale=ONE_TOKEN),
    Replay(output_scale=ONE_TOKEN),
    "Where nothing is evicted, the nodes together find what one LRU cache finds. In small caches "
    "they find less, because a block is in GPUs and in a CPU tier at once, and on every node that "
    "has read it. Local caches find nearly twice as much as published, because the router sends "
    "prompts to the node that has their prefix: with the least loaded node in its place (see "
    "prefix caching) a node finds 7.7 %. How the published ones were routed is not said. What is "
    "evicted first makes little difference.",
)
