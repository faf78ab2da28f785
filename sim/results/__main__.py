"""`python -m sim.results --trace FILE`: docs/results/mooncake.md, of simulations that are kept."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from baton.errors import ConfigError
from sim.results.experiments import EXPERIMENTS
from sim.results.experiments.experiment import Experiment
from sim.results.experiments.search import Search, kept_search, searched
from sim.results.page import findings, page
from sim.results.runs import Runs

_PROG = "python -m sim.results"
PAGE = Path("docs/results/mooncake.md")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        runs = Runs(options.trace, options.keep)
        for experiment in _chosen(options.only):
            _simulate(experiment, runs, options.quick)
        kept = Runs(options.trace, options.keep, only_kept=True)
        before = options.page.read_text(encoding="utf-8") if options.page.exists() else ""
        found = [
            kept_search(experiment, kept)
            if isinstance(experiment, Search)
            else findings(experiment, kept)
            for experiment in EXPERIMENTS
        ]
        text = page(found, kept.sources, before)
        options.page.write_text(text, encoding="utf-8")
    except (ConfigError, OSError) as error:
        sys.exit(f"{_PROG}: {getattr(error, 'message', error)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROG, description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--trace", type=Path, required=True, help="Mooncake's conversation trace")
    add("--keep", type=Path, default=Path("build/results"), help="directory of what was simulated")
    add("--page", type=Path, default=PAGE, help="what to write")
    add("--quick", action="store_true", help="a piece of the trace in place of all of it")
    keys = ", ".join(experiment.key for experiment in EXPERIMENTS)
    add("--only", help=f"of {keys}, with commas; 'none': only write the page")
    return parser


def _chosen(only: str | None) -> Sequence[Experiment | Search]:
    """Raises ConfigError."""
    if only is None:
        return EXPERIMENTS
    known = {experiment.key: experiment for experiment in EXPERIMENTS}
    try:
        return [known[key] for key in only.split(",") if key != "none"]
    except KeyError as error:
        raise ConfigError(f"there is no experiment {error}") from error


def _simulate(experiment: Experiment | Search, runs: Runs, quick: bool) -> None:
    replay = experiment.quick if quick else experiment.full
    if isinstance(experiment, Search):
        began = time.monotonic()
        searched(experiment, replay, runs)
        _took(experiment.key, began)
        return
    for row, run in zip(experiment.rows, experiment.runs(replay), strict=True):
        began = time.monotonic()
        runs.outcome(run)
        _took(f"{experiment.key}: {row.label}", began)


def _took(what: str, began: float) -> None:
    sys.stderr.write(f"{what}, {time.monotonic() - began:.0f} s\n")


if __name__ == "__main__":
    sys.exit(main())
