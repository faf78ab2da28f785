"""`baton sim` and `baton plan`: a datacentre in virtual time. The simulator is a program of its
own, which the command line starts like the processes. Every flag, `--help` too, is its own."""

from __future__ import annotations

import typer

from baton.cli.bench_process import run_module

_MODULES = {"compare": "sim.report", "report": "sim.report", "workload": "sim.workload"}


def sim(context: typer.Context) -> None:
    """Replay a trace; compare A B, report RESULT, workload stats|make|scale: see docs/sim.md."""
    first = context.args[0] if context.args else "--help"
    if first not in _MODULES:
        run_module("sim.fleet", context.args or [first])
    else:
        keep = first == "compare"  # a command of sim.report's own
        run_module(_MODULES[first], context.args if keep else context.args[1:])


def plan(context: typer.Context) -> None:
    """The cheapest fleet that keeps SLOs for a trace, by simulation: see docs/sim.md."""
    run_module("sim.sizing", context.args or ["--help"])
