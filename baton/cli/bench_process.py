"""`baton bench store` and `baton bench router`: the benchmarks of processes, which the command line
starts like the processes themselves. Every flag, `--help` too, is theirs."""

from __future__ import annotations

import subprocess
import sys

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench_store(context: typer.Context) -> None:
    """Put and get blocks in each tier of a store, next to a memory copy and the raw disk."""
    _run("kvstore.bench", context)


def bench_router(context: typer.Context) -> None:
    """Route for a thousand workers and ten million blocks; relay tokens."""
    _run("conductor.bench_router", context)


def _run(module: str, context: typer.Context) -> None:
    done = subprocess.run([sys.executable, "-m", module, *context.args], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
