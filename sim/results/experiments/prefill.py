"""What prefill computes, with and without reuse."""

from __future__ import annotations

from dataclasses import replace

from sim.fleet.spec import Cache, FleetSpec
from sim.results.experiments.common import BATON, CACHED, DRAM_BLOCKS, GPU_S, cached, per_request
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.runs import Replay

CHUNKED = replace(BATON, cache=Cache.NONE, chunk_tokens=512)
POOLED = replace(BATON, store_blocks=DRAM_BLOCKS)

PREFILL = Experiment(
    "prefill",
    "Prefill GPU time",
    "LLaMA3-70B on 16 nodes. What prefill workers compute, so that a step of a decode never hides "
    "in it; the baselines reuse nothing, reuse what one of 16 nodes has in its GPUs, or compute "
    "chunks of 512 tokens. Published: FAST'25, figure 8.",
    (
        Column(GPU_S, per_request("prefill_busy_s"), "{:.3f} s", over_first=True),
        Column(CACHED, cached, "{:.1f} %"),
    ),
    (
        Row("baton, 3M tokens of DRAM per node", POOLED, {GPU_S: 1.062}),
        Row("baton, GPU memory only", BATON),
        Row("no reuse", replace(BATON, cache=Cache.NONE), {GPU_S: 1.661}),
        Row(
            "prefix caching",
            FleetSpec("16P+8D", policy="least-loaded", cache=Cache.LOCAL),
            {GPU_S: 1.523},
        ),
        Row("chunked prefill", CHUNKED, {GPU_S: 2.021}),
    ),
    Replay(first=1000),
    Replay(),
    "What chunks add hangs on no reuse: 1.21 times the prefill without, published 1.22. A piece "
    "from the beginning of the trace has fewer prefixes to reuse, so that its ratios are smaller.",
)
