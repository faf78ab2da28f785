"""What several experiments have: limits, sizes, fleets and figures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sim.fleet.records import OK
from sim.fleet.spec import FleetSpec
from sim.results.runs import Outcome

TTFT_S = 30.0  # SLO of every published figure of capacity
DRAM_BLOCKS = 3_000_000 // 512  # of a node, as in FAST'25

BATON = FleetSpec("8P+8D")

GPU_S = "prefill GPU time of a request"
CACHED = "prompt tokens from caches"


def per_request(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.result.totals[name] / outcome.result.totals["requests"]


def ttft(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.result.totals["ttft_s"][name]


def cached(outcome: Outcome) -> float:
    return 100 * float(outcome.result.totals["cached_share"])


def effective(outcome: Outcome, tbt_s: float, ttft_s: float = TTFT_S) -> float:
    """Percent of all requests whose first token came in time, and whose longest tenth of gaps is
    short enough on average: FAST'25's effective requests."""
    records = outcome.result.records
    slow = records.column("tbt_worst_s") > tbt_s  # NaN, of one token, is not
    met = records.where("code", OK) & (records.column("ttft_s") <= ttft_s) & ~slow
    return 100 * float(np.mean(met))
