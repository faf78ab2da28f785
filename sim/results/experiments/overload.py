"""Early rejection under overload."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sim.fleet.records import OK
from sim.fleet.spec import Admission, FleetSpec
from sim.results.experiments.common import GPU_S, per_request
from sim.results.experiments.experiment import Column, Curves, Experiment, Row
from sim.results.load import Loads, loads, variation
from sim.results.runs import Outcome, Replay

# One decode node keeps 50 ms with fewer requests than eight prefill nodes can give it.
FLEET = FleetSpec("8P+1D", slo_tbt_s=0.05, grain=4)
_LOAD = "0:0.5,60:3"  # costs are known when there is too much


def _refused(outcome: Outcome) -> float:
    return float(np.sum(~outcome.result.records.where("code", OK)))


def _missed(outcome: Outcome) -> float:
    told = outcome.result.totals
    return float(told["requests"] - told["good"])


def _settled(outcome: Outcome) -> Loads:
    return loads(outcome.result.records).settled


def _curves(outcome: Outcome) -> Curves:
    found = loads(outcome.result.records)
    return {"prefill": found.prefill, "decode": found.decode}


_MISSED = "refused or late"
OVERLOAD = Experiment(
    "overload",
    "Early rejection under overload",
    "8P+1D, for a minute at half of the recorded speed, then at three times that speed, about "
    "three times what they can take. Requests that were refused, and all that missed TTFT ≤ 30 s "
    "or p90 TBT ≤ 50 ms. Load: requests whose first token is still to come (prefill), and those "
    "that decode; its variation is the deviation over the mean, after the first quarter of the "
    "time. Published: Mooncake's technical report, of 23,000 requests at twice their speed on "
    "8P+8D, counts the refused; its baseline refuses before decode, which baton does not do: "
    "there, requests are late.",
    (
        Column("refused", _refused, "{:.0f}"),
        Column(_MISSED, _missed, "{:.0f}"),
        Column(GPU_S, per_request("prefill_busy_s"), "{:.3f} s"),
        Column("variation of prefill", lambda o: variation(_settled(o).prefill), "{:.2f}"),
        Column("of decode", lambda o: variation(_settled(o).decode), "{:.2f}"),
        Column("their correlation", lambda o: _settled(o).correlation, "{:+.2f}"),
    ),
    (
        Row("never", FLEET, {_MISSED: 4183}),
        Row("by load", replace(FLEET, admission=Admission.LOAD), {_MISSED: 3771}),
        Row("by prediction", replace(FLEET, admission=Admission.PREDICTION), {_MISSED: 3589}),
    ),
    Replay(first=300, load=_LOAD),
    Replay(first=3000, load=_LOAD),
    "By load, prompts are let in while few requests decode; when they come to decode, the node has "
    "more than twice the 40 or so that keep 50 ms, and nobody is let in until they have ended: the "
    "swing that the report describes. What baton learns from missed limits (`conductor/margin.py`) "
    "damps it. By prediction, prompts that are being computed count, too, and loads swing less. "
    "Numbers of refusals cannot be compared: nodes, limits and load are not the published ones.",
    _curves,
)
