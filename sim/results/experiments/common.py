"""What several experiments have: limits, sizes, fleets and figures."""

from __future__ import annotations

from collections.abc import Callable

from sim.fleet.spec import FleetSpec
from sim.results.runs import Outcome

TTFT_S = 30.0  # SLO of every published figure of capacity
DRAM_BLOCKS = 3_000_000 // 512  # of a node, as in FAST'25

BATON = FleetSpec("8P+8D")

GPU_S = "prefill GPU time of a request"


def per_request(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.result.totals[name] / outcome.result.totals["requests"]


def ttft(name: str) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.result.totals["ttft_s"][name]


def cached(outcome: Outcome) -> float:
    return 100 * float(outcome.result.totals["cached_share"])
