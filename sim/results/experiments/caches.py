"""Caches of nodes and of the cluster, by capacity and eviction."""

from __future__ import annotations

from sim.fleet.spec import Cache, FleetSpec
from sim.results.experiments.common import DRAM_BLOCKS, GPU_S, cached, per_request
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.runs import ONE_TOKEN, Replay


def _prefill_only(cache: Cache, eviction: str, blocks: int) -> FleetSpec:
    """Ten nodes as in FAST'25, with GPU memory for little more than the longest prompt."""
    return FleetSpec("10P+1D", cache=cache, eviction=eviction, store_blocks=blocks, kv_blocks=512)


_HITS = "prompt tokens from caches"
CACHES = Experiment(
    "caches",
    "Caches: global against local, by capacity and eviction",
    "Ten prefill nodes, answers of one token. Published, with 3M tokens per node: FAST'25, "
    "figure 10.",
    (
        Column(_HITS, cached, "{:.1f} %"),
        Column(GPU_S, per_request("prefill_busy_s"), "{:.3f} s"),
    ),
    tuple(
        Row(
            f"{cache}, {eviction}, {blocks * 512 / 1e6:.2g}M tokens per node",
            _prefill_only(cache, eviction, blocks),
            published,
        )
        for cache, eviction, blocks, published in (
            (Cache.GLOBAL, "lru", DRAM_BLOCKS, {_HITS: 37.5, GPU_S: 1.051}),
            (Cache.LOCAL, "lru", DRAM_BLOCKS, {_HITS: 16.9, GPU_S: 1.379}),
            (Cache.GLOBAL, "lru", 400, {}),
            (Cache.GLOBAL, "lfu", 400, {}),
            (Cache.GLOBAL, "length_aware", 400, {}),
            (Cache.LOCAL, "lru", 400, {}),
        )
    ),
    Replay(first=300, output_scale=ONE_TOKEN),
    Replay(output_scale=ONE_TOKEN),
    "A piece of the trace refers to few blocks, which is why small capacities are among the rows: "
    "with 3M tokens per node nothing of it is ever evicted.",
)
