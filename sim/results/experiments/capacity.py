"""Effective requests of 16 nodes, coupled and not."""

from __future__ import annotations

from dataclasses import replace

from sim.fleet.spec import Cache, FleetSpec
from sim.results.experiments.common import BATON, effective
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.runs import Replay

WHOLE_PROMPT = 1 << 17  # prompt tokens of a step: no prompt of the trace is longer
COUPLED = FleetSpec("16M", policy="least-loaded", cache=Cache.NONE, mixed_tokens=WHOLE_PROMPT)


def _effective(tbt_ms: int) -> Column:
    return Column(
        f"TBT ≤ {tbt_ms} ms", lambda outcome: effective(outcome, tbt_ms / 1e3), "{:.1f} %"
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
