"""Early rejection under overload."""

from __future__ import annotations

import numpy as np

from sim.fleet.records import OK
from sim.fleet.spec import Admission, FleetSpec
from sim.results.experiments.common import GPU_S, per_request
from sim.results.experiments.experiment import Column, Experiment, Row
from sim.results.runs import Outcome, Replay


def _refused(outcome: Outcome) -> float:
    return float(np.sum(~outcome.result.records.where("code", OK)))


def _missed(outcome: Outcome) -> float:
    told = outcome.result.totals
    return float(told["requests"] - told["good"])


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
        Column(GPU_S, per_request("prefill_busy_s"), "{:.3f} s"),
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
