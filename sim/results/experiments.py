"""What is simulated, next to what is published: rows of specs, columns of figures.

Published figures are of Mooncake's papers (FAST'25, and its technical report for early rejection),
most of them read off the coordinates of their plots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from sim.fleet.records import OK
from sim.fleet.spec import Admission, Cache, FleetSpec
from sim.results.runs import ONE_TOKEN, Outcome, Replay

TTFT_S = 30.0  # SLO of every published figure of capacity
WHOLE_PROMPT = 1 << 17  # prompt tokens of a step: no prompt of the trace is longer
DRAM_BLOCKS = 3_000_000 // 512  # of a node, as in FAST'25


@dataclass(frozen=True, slots=True)
class Column:
    """A figure of a run. With `over_first`, it is shown over that of the first row, too."""

    heading: str
    of: Callable[[Outcome], float]
    form: str  # as in str.format
    over_first: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """`published`: in the column's unit, by its heading."""

    label: str
    spec: FleetSpec
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Experiment:
    """`why`: reasons where simulated and published figures differ."""

    key: str
    title: str
    lead: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    quick: Replay
    full: Replay
    why: str


def _per_request(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.result.totals[name] / outcome.result.totals["requests"]


def _ttft(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.result.totals["ttft_s"][name]


def _cached(outcome: Outcome) -> float:
    return 100 * float(outcome.result.totals["cached_share"])


def effective(outcome: Outcome, tbt_s: float) -> float:
    """Percent of all requests whose first token came in time, and whose longest tenth of gaps is
    short enough on average: FAST'25's effective requests."""
    records = outcome.result.records
    slow = records.column("tbt_worst_s") > tbt_s  # NaN, of one token, is not
    met = records.where("code", OK) & (records.column("ttft_s") <= TTFT_S) & ~slow
    return 100 * float(np.mean(met))


def _effective(tbt_ms: int) -> Column:
    return Column(
        f"TBT ≤ {tbt_ms} ms", lambda outcome: effective(outcome, tbt_ms / 1e3), "{:.1f} %"
    )


def _refused(outcome: Outcome) -> float:
    return float(np.sum(~outcome.result.records.where("code", OK)))


def _missed(outcome: Outcome) -> float:
    told = outcome.result.totals
    return float(told["requests"] - told["good"])


BATON = FleetSpec("8P+8D")
COUPLED = FleetSpec("16M", policy="least-loaded", cache=Cache.NONE, mixed_tokens=WHOLE_PROMPT)
# A step has room for a unit of each of `max_seqs`, so that many units are the smallest chunk.
CHUNKED = replace(BATON, cache=Cache.NONE, chunk_tokens=512, max_seqs=32)
POOLED = replace(BATON, store_blocks=DRAM_BLOCKS)
_GPU_S = "prefill GPU time of a request"
_TTFT = "mean TTFT"

PREFILL = Experiment(
    "prefill",
    "Prefill GPU time",
    "LLaMA3-70B on 16 nodes. What prefill workers compute, so that a step of a decode never hides "
    "in it; the baselines reuse nothing, reuse what one of 16 nodes has in its GPUs, or compute "
    "chunks of 512 tokens. Published: FAST'25, figure 8.",
    (
        Column(_GPU_S, _per_request("prefill_busy_s"), "{:.3f} s", over_first=True),
        Column("prompt tokens from caches", _cached, "{:.1f} %"),
    ),
    (
        Row("baton, 3M tokens of DRAM per node", POOLED, {_GPU_S: 1.062}),
        Row("baton, GPU memory only", BATON),
        Row("no reuse", replace(BATON, cache=Cache.NONE), {_GPU_S: 1.661}),
        Row(
            "prefix caching",
            FleetSpec("16P+8D", policy="least-loaded", cache=Cache.LOCAL),
            {_GPU_S: 1.523},
        ),
        Row("chunked prefill", CHUNKED, {_GPU_S: 2.021}),
    ),
    Replay(first=1000),
    Replay(),
    "The published figures are of the whole trace. A piece from its beginning has fewer prefixes "
    "to reuse, so that ratios come out smaller. What chunks add hangs on no reuse: published, 1.22 "
    "times the prefill without.",
)

POLICIES = Experiment(
    "policies",
    "Routing policies",
    "Mean time to the first token. Published: FAST'25, figure 5.",
    (
        Column(_TTFT, _ttft("mean"), "{:.2f} s", over_first=True),
        Column("p90 TTFT", _ttft("p90"), "{:.2f} s"),
        Column("prompt tokens from caches", _cached, "{:.1f} %"),
    ),
    (
        Row("global", BATON, {_TTFT: 3.07}),
        Row("local cache-aware", replace(BATON, cache=Cache.LOCAL), {_TTFT: 3.58}),
        Row(
            "load balance",
            replace(BATON, policy="least-loaded", cache=Cache.LOCAL),
            {_TTFT: 5.27},
        ),
        Row("random", replace(BATON, policy="random", cache=Cache.LOCAL), {_TTFT: 19.65}),
    ),
    Replay(first=1000, speed=1.33),
    Replay(speed=1.33),
    "Times hang on the load, which is not published; here it is 1.33 times the recorded one, so "
    "only the order and, roughly, the ratios can be compared. In the first 300 requests there is "
    "little to read from others, and local came out before global (2.80 and 2.88 s).",
)


def _fine(spec: FleetSpec) -> FleetSpec:
    """Where gaps of short answers count: a prompt that is handed over waits for the unit's end."""
    return replace(spec, grain=4)


CAPACITY = Experiment(
    "capacity",
    "Effective requests of 16 nodes",
    "The trace at its own speed: requests with TTFT ≤ 30 s whose longest tenth of gaps is within "
    "the TBT limit on average. Published: FAST'25, figure 1; its +498, +157 and +59 % are the "
    "first row over the second.",
    (_effective(100), _effective(200), _effective(300)),
    (
        Row(
            "baton", _fine(BATON), {"TBT ≤ 100 ms": 96.6, "TBT ≤ 200 ms": 100, "TBT ≤ 300 ms": 100}
        ),
        Row(
            "coupled",
            _fine(COUPLED),
            {"TBT ≤ 100 ms": 16.1, "TBT ≤ 200 ms": 38.8, "TBT ≤ 300 ms": 62.7},
        ),
        Row(
            "coupled, prefix caching",
            _fine(replace(COUPLED, cache=Cache.LOCAL)),
            {"TBT ≤ 100 ms": 15.0, "TBT ≤ 200 ms": 34.3, "TBT ≤ 300 ms": 55.5},
        ),
        Row(
            "coupled, chunked prefill",
            _fine(replace(COUPLED, mixed_tokens=512)),
            {"TBT ≤ 100 ms": 9.4, "TBT ≤ 200 ms": 28.8, "TBT ≤ 300 ms": 55.2},
        ),
    ),
    Replay(first=300),
    Replay(),
    "The baselines have baton's own engine loop, and the cost model counts nothing for Python "
    "between two steps or per sequence; the published ones are vLLM 0.5.1. A prompt that is handed "
    "over waits for the end of a unit of 4 decode steps, which shows in answers of a few tokens.",
)


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
        Column(_HITS, _cached, "{:.1f} %"),
        Column(_GPU_S, _per_request("prefill_busy_s"), "{:.3f} s"),
    ),
    tuple(
        Row(
            f"{cache}, {eviction}, {blocks * 512 / 1e6:.2g}M tokens per node",
            _prefill_only(cache, eviction, blocks),
            published,
        )
        for cache, eviction, blocks, published in (
            (Cache.GLOBAL, "lru", DRAM_BLOCKS, {_HITS: 37.5, _GPU_S: 1.051}),
            (Cache.LOCAL, "lru", DRAM_BLOCKS, {_HITS: 16.9, _GPU_S: 1.379}),
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

_MISSED = "refused or late"
OVERLOAD = Experiment(
    "overload",
    "Early rejection under overload",
    "Twice the recorded speed on half of the nodes. Requests that were refused, and all "
    "that missed TTFT ≤ 30 s or p90 TBT ≤ 200 ms. Published: Mooncake's technical report, of "
    "23,000 requests at twice their speed, counts the refused; its baseline refuses before decode, "
    "which baton does not do: there, requests are late.",
    (
        Column("refused", _refused, "{:.0f}"),
        Column(_MISSED, _missed, "{:.0f}"),
        Column(_GPU_S, _per_request("prefill_busy_s"), "{:.3f} s"),
    ),
    (
        Row("never", FleetSpec("4P+4D"), {_MISSED: 4183}),
        Row("by load", FleetSpec("4P+4D", admission=Admission.LOAD), {_MISSED: 3771}),
        Row("by prediction", FleetSpec("4P+4D", admission=Admission.PREDICTION), {_MISSED: 3589}),
    ),
    Replay(first=300, speed=2.0),
    Replay(speed=2.0),
    "Refusing early saves the GPU time of prompts that would have been late. By load and by "
    "prediction differ only where the TBT limit binds; here the TTFT limit does.",
)

EXPERIMENTS = (PREFILL, POLICIES, CAPACITY, CACHES, OVERLOAD)
