"""`python -m sim.sizing --trace FILE --slo ttft=30,tbt=0.1`: the cheapest fleet for it.

Simulates fleets around an estimate, and prints the one with the fewest nodes, how much more load
it takes, and how many coupled workers do the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from baton.errors import ConfigError
from sim.fleet.flags import add_spec_flags, add_trace_flags, requests_of, spec_of, workload_of
from sim.fleet.hardware import Hardware
from sim.fleet.progress import ProgressLine
from sim.fleet.run import simulate
from sim.fleet.spec import FleetSpec
from sim.fleet.totals import good
from sim.sizing.demand import Demand, Machine, demand
from sim.sizing.search import MOST_LOAD, Fleet, Outcome, Search
from sim.workload.trace import Request, scaled

_PROG = "python -m sim.sizing"
_OURS = ("cluster", "elastic", "slo_ttft_s", "slo_tbt_s")  # fields of a spec that have no flag


@dataclass(frozen=True, slots=True)
class Answer:
    fleet: Fleet
    load: float  # times the trace's, that it takes
    coupled: Fleet | None  # None: as many coupled workers are not enough


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        ttft_s, tbt_s = _slos(options.slo)
        spec = spec_of(options, cluster="1P+1D", elastic=False, slo_ttft_s=ttft_s, slo_tbt_s=tbt_s)
        requests = requests_of(options)
        _check(options, requests)
        asked = _demand(spec, requests)
        search = Search(_Simulations(spec, requests).run, options.share, options.most_nodes)
        answer = _answer(search, asked, options.coupled)
        _deliver(_body(options, requests, search, answer), options)
    except ConfigError as error:
        sys.exit(f"{_PROG}: {error.message}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add_trace_flags(parser)
    add("--slo", required=True, metavar="ttft=S,tbt=S", help="seconds; TBT: nine in ten gaps")
    add("--share", type=float, default=0.9, help="of all requests, that must keep both")
    add("--most-nodes", type=int, default=64, help="where the search ends")
    add("--coupled", action=argparse.BooleanOptionalAction, default=True, help="compare with nM")
    add("--json", metavar="FILE", help="the answer and all that was tried; - = stdout")
    add_spec_flags(parser, without=_OURS)
    return parser


def _slos(text: str) -> tuple[float, float]:
    """Raises ConfigError."""
    parts = dict(part.partition("=")[::2] for part in text.split(","))
    try:
        ttft_s, tbt_s = float(parts.pop("ttft")), float(parts.pop("tbt"))
    except (KeyError, ValueError):
        ttft_s = tbt_s = math.nan
    if parts or not (0 < ttft_s < math.inf and 0 < tbt_s < math.inf):
        raise ConfigError(f"--slo takes ttft=SECONDS,tbt=SECONDS, not {text}")
    return ttft_s, tbt_s


def _check(options: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Before the work. Raises ConfigError."""
    if not requests:
        raise ConfigError(f"{options.trace} has no requests")
    if not 0 < options.share <= 1:
        raise ConfigError(f"--share is above 0 and at most 1, not {options.share}")
    if options.most_nodes < 2:
        raise ConfigError("--most-nodes is at least 2")
    if options.json and not Path(options.json).parent.is_dir():
        raise ConfigError(f"there is no directory for {options.json}")


def _demand(spec: FleetSpec, requests: Sequence[Request]) -> Demand:
    hardware = Hardware(spec)
    machine = Machine(hardware.cost, hardware.kv_blocks, spec.max_seqs)
    asked = demand(requests, machine, spec.slo_ttft_s, spec.slo_tbt_s)
    bound = "memory" if asked.kv_bound else "the SLO"
    _say(
        f"estimate: {asked.prefill:.2f} prefill and {asked.decode:.2f} decode workers' work, "
        f"in batches of {asked.batch} ({bound} allows no more)"
    )
    return asked


class _Simulations:
    """Of fleets under the trace; each says on standard error what came of it."""

    def __init__(self, spec: FleetSpec, requests: Sequence[Request]) -> None:
        self._spec = spec
        self._requests = requests

    def run(self, fleet: Fleet, load: float) -> Outcome:
        spec = dataclasses.replace(self._spec, cluster=str(fleet))
        line = ProgressLine(len(self._requests), f"{fleet} at {load:g} x the load")
        records = simulate(spec, scaled(self._requests, load), {}, line.update).records
        line.clear()
        outcome = Outcome(
            *(
                float(good(records, ttft_s, tbt_s).sum()) / len(records)
                for ttft_s, tbt_s in (
                    (spec.slo_ttft_s, spec.slo_tbt_s),
                    (spec.slo_ttft_s, math.inf),
                    (math.inf, spec.slo_tbt_s),
                )
            )
        )
        _say(f"{fleet} at {load:g} x the load: {_shares(outcome)}")
        return outcome


def _answer(search: Search, asked: Demand, coupled: bool) -> Answer:
    fleet = search.disaggregated(*asked.workers)
    same = search.coupled(fleet.nodes) if coupled else None
    return Answer(fleet, search.margin(fleet), same)


def _body(
    options: argparse.Namespace, requests: list[Request], search: Search, answer: Answer
) -> dict[str, Any]:
    fleet, coupled = answer.fleet, answer.coupled
    return {
        "workload": workload_of(options, len(requests)),
        "slo": options.slo,
        "share": options.share,
        "fleet": str(fleet),
        "nodes": fleet.nodes,
        "outcome": dataclasses.asdict(search.outcome(fleet)),
        "load": answer.load,
        "coupled": None if coupled is None else str(coupled),
        "tried": [
            {"fleet": str(one.fleet), "load": one.load, **dataclasses.asdict(one.outcome)}
            for one in search.tried
        ],
    }


def _deliver(body: dict[str, Any], options: argparse.Namespace) -> None:
    data = orjson.dumps(body, option=orjson.OPT_INDENT_2) + b"\n"
    if options.json == "-":
        sys.stdout.buffer.write(data)
        return
    if options.json:
        Path(options.json).write_bytes(data)
    coupled = "not looked at"
    if options.coupled:
        coupled = body["coupled"] or f"more than {body['nodes']} nodes"
    load = f"up to {body['load']:g} times this load"
    rows = (
        ("cheapest fleet", f"{body['fleet']}, {body['nodes']} nodes of {options.node}"),
        ("within the SLOs", _shares(Outcome(**body["outcome"]))),
        ("takes", load if body["load"] < MOST_LOAD else f"{MOST_LOAD:g} times this load, or more"),
        ("the same coupled", coupled),
    )
    sys.stdout.write("".join(f"{label:<28}{value}\n" for label, value in rows))


def _shares(outcome: Outcome) -> str:
    return f"{outcome.good:.1%} (TTFT {outcome.ttft:.1%}, TBT {outcome.tbt:.1%})"


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
