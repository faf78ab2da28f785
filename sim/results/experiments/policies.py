"""Time to the first token by routing policy."""

from __future__ import annotations

from dataclasses import replace

from sim.fleet.spec import Cache
from sim.results.experiments.common import BATON, CACHED, cached, ttft
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.runs import Replay

_TTFT = "mean TTFT"

POLICIES = Experiment(
    "policies",
    "Routing policies",
    "Mean time to the first token. Published: FAST'25, figure 5.",
    (
        Column(_TTFT, ttft("mean"), "{:.2f} s", over_first=True),
        Column("p90 TTFT", ttft("p90"), "{:.2f} s"),
        Column(CACHED, cached, "{:.1f} %"),
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
    "only the order and, roughly, the ratios can be compared.",
)
