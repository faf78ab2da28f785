"""One size at a time: prefill and decode nodes, the network, and how much prompts share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sim.fleet.spec import Cache, FleetSpec
from sim.results.experiments.common import (
    BATON,
    CACHED,
    GPU_S,
    cached,
    effective,
    per_request,
    ttft,
)
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.runs import Outcome, Replay

NODES = 16
_TTFT, _TBT = "mean TTFT", "mean TBT"


def _tbt_ms(outcome: Outcome) -> float:
    return 1e3 * float(outcome.result.totals["tbt_mean_s"]["mean"])


def _longest_gap(outcome: Outcome) -> float:
    return float(np.nanmean(outcome.result.records.column("tbt_max_s")))


_EFFECTIVE = "TTFT ≤ 10 s, TBT ≤ 100 ms"


def _effective(outcome: Outcome) -> float:
    return effective(outcome, 0.1, 10.0)


# Of figure 15, by prefill nodes: effective requests in percent, seconds, milliseconds.
_RATIOS: dict[int, tuple[float, float, float]] = {
    5: (77.7, 5.74, 31.5),
    6: (97.2, 1.71, 31.8),
    7: (99.1, 1.30, 32.9),
    8: (99.0, 1.19, 35.0),
    9: (99.2, 1.12, 38.2),
    10: (98.4, 1.11, 44.2),
    11: (86.1, 1.14, 58.3),
}


def _split(prefill: int) -> Row:
    fleet = f"{prefill}P+{NODES - prefill}D"
    published = dict(zip((_EFFECTIVE, _TTFT, _TBT), _RATIOS.get(prefill, ()), strict=False))
    return Row(fleet, FleetSpec(fleet), published)


RATIO = Experiment(
    "ratio",
    "Prefill and decode nodes, 16 in all",
    "Requests with TTFT ≤ 10 s whose longest tenth of gaps is within 100 ms on average. The trace "
    "at twice its speed with answers four times as long, so that too few nodes of either kind "
    "show. Published: FAST'25, figure 15, of its synthetic trace at a load that is not said.",
    (
        Column(_EFFECTIVE, _effective, "{:.1f} %"),
        Column(_TTFT, ttft("mean"), "{:.2f} s"),
        Column(_TBT, _tbt_ms, "{:.1f} ms"),
    ),
    tuple(_split(prefill) for prefill in (2, 5, 6, 8, 10, 11, 12, 14)),
    Replay(first=300, speed=2.0, output_scale=4.0),
    Replay(first=1000, speed=2.0, output_scale=4.0),
    "This is more than 16 nodes can take: with few prefill nodes prompts queue, with few decode "
    "nodes steps are long, and with two their memory is full. The best is 10P+6D, where three "
    "quarters of the requests are within both limits; published, anything from 6 to 10 prefill "
    "nodes is as good, at a load that 16 nodes can take. Decode slows down with fewer nodes, at "
    "this load more than published.",
)

_SYNTHETIC_TTFT = {24: 5.09, 40: 2.40, 80: 1.73, 160: 1.41, 400: 1.25}  # by Gbps, figure 13


def _network(cache: Cache, gbps: int) -> Row:
    spec = replace(BATON, cache=cache, network_gbps=float(gbps), grain=4)
    published = {_TTFT: _SYNTHETIC_TTFT[gbps]} if gbps in _SYNTHETIC_TTFT else {}
    return Row(f"{cache}, {gbps} Gbps", spec, published if cache is Cache.GLOBAL else {})


NETWORK = Experiment(
    "network",
    "Network bandwidth of a node",
    "8P+8D at 1.33 times the recorded speed, so that prompts queue; each node reuses its own KV, "
    "or all nodes read each other's. The longest gap of an answer is mostly the handoff, which "
    "the first token does not wait for. Published: FAST'25, figure 13, of its synthetic trace.",
    (
        Column(_TTFT, ttft("mean"), "{:.2f} s"),
        Column("p90 TTFT", ttft("p90"), "{:.2f} s"),
        Column(CACHED, cached, "{:.1f} %"),
        Column("mean longest gap", _longest_gap, "{:.3f} s"),
    ),
    (
        *(_network(Cache.GLOBAL, gbps) for gbps in (10, 24, 40, 80, 160, 400, 800)),
        *(_network(Cache.LOCAL, gbps) for gbps in (10, 80, 800)),
        Row("no reuse", replace(BATON, cache=Cache.NONE, grain=4), {_TTFT: 2.62}),
    ),
    Replay(first=300, speed=1.33),
    Replay(first=1000, speed=1.33),
    "A prompt of 14,000 tokens has 4.7 GB of KV, so that handoffs alone are 18 Gbps per node at "
    "this load: with 10, answers stop for minutes after their first token, which itself is hardly "
    "later. From 80 Gbps on the handoff is a third of a second. Nodes read prefixes from each "
    "other from 40 Gbps on, and from 80 on as many as with more (the paper's bound for reuse is "
    "48); below, the router computes them. Not explained: published TTFT falls by three quarters "
    "from 24 to 400 Gbps, and here by a sixth.",
)

_BLOCKS = 40  # of a prompt, 512 tokens each


def _reuse(shared: int, cache: Cache) -> Row:
    """`shared` blocks of each prompt are one of 64 prefixes."""
    policy = "cache-aware" if cache is Cache.GLOBAL else "least-loaded"
    make = (
        f"prefixes --levels 1 --fan-out 64 --node-tokens {shared * 512} "
        f"--input {(_BLOCKS - shared) * 512} --sigma 0 --rate 4"
    )
    spec = replace(BATON, cache=cache, policy=policy)
    return Row(f"{100 * shared // _BLOCKS} % shared, {cache}", spec, make=make)


REUSE = Experiment(
    "reuse",
    "Prefix reuse",
    "8P+8D, 4 requests per second: prompts of 20,480 tokens, of which a part is one of 64 "
    "prefixes, chosen by Zipf's law, and answers of 256. Without reuse they are more than 8 nodes "
    "can compute. Global: baton; local: the least loaded node, which reuses what it has.",
    (
        Column(CACHED, cached, "{:.1f} %"),
        Column(GPU_S, per_request("prefill_busy_s"), "{:.3f} s"),
        Column(_TTFT, ttft("mean"), "{:.2f} s"),
        Column("p90 TTFT", ttft("p90"), "{:.2f} s"),
        Column(_EFFECTIVE, _effective, "{:.1f} %"),
    ),
    (
        *(_reuse(shared, Cache.GLOBAL) for shared in (0, 10, 20, 30, 36, 38)),
        *(_reuse(shared, Cache.LOCAL) for shared in (20, 36, 38)),
    ),
    Replay(first=300),
    Replay(first=1000),
    "Each prefix has to be computed once, so that caches find less than what is shared. Prompts "
    "queue where nothing is shared, and hardly where half is. The least loaded node finds three "
    "quarters of what routing by caches finds: it computes 1.2 times as much where half is shared,"
    " and 2.8 times where 95 % are.",
)
