"""`baton bench store` and `baton bench router`: the benchmarks of processes, which the command line
starts like the processes themselves. Every flag, `--help` too, is theirs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import typer

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench_store(context: typer.Context) -> None:
    """Put and get blocks in each tier of a store, next to a memory copy and the raw disk."""
    run_module("kvstore.bench", context.args)


def bench_router(context: typer.Context) -> None:
    """Route for a thousand workers and ten million blocks; relay tokens."""
    run_module("conductor.bench_router", context.args)


def run_module(module: str, arguments: Sequence[str]) -> None:
    """Its exit code is ours."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
