"""`python -m sim.faults`: run many seeds of the fault harness, or replay one.

One seed is one exactly repeatable run. Exit status 1 when anything was wrong in any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path

from sim.run import GOOD_ENDS, Outcome, run_seed, run_seed_of_several

CHUNK = 10  # seeds that a process gets at a time
Run = Callable[[int], Outcome]
SHOWN = 5  # failing seeds whose logs are printed


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    run = run_seed_of_several if options.conductors else run_seed
    if options.seed is not None:
        outcome = run(options.seed, options.verbose)
        _show(outcome)
        sys.stdout.write(f"{_headline(outcome, options.conductors)}\n")
        return 1 if outcome.violations else 0
    began = time.perf_counter()
    seeds = range(options.first, options.first + options.seeds)
    outcomes = []
    for outcome in run_many(seeds, options.jobs, run):
        outcomes.append(outcome)
        if outcome.errors and options.errors:
            sys.stdout.write(f"seed {outcome.seed}: {'; '.join(outcome.errors)}\n")
        if outcome.violations:
            failed = sum(1 for one in outcomes if one.violations)
            if failed <= SHOWN:
                _show(outcome, options.verbose)
            sys.stdout.write(f"{_headline(outcome, options.conductors)}\n")
        sys.stdout.flush()  # a long run is watched
    summary = summarize(outcomes, time.perf_counter() - began)
    if options.json:
        Path(options.json).write_text(json.dumps(summary, indent=2) + "\n")
    sys.stdout.write(f"{_summary_line(summary)}\n")
    return 1 if summary["failed_seeds"] else 0


def run_many(seeds: Iterable[int], jobs: int, run: Run = run_seed) -> Iterator[Outcome]:
    """In so many processes, in the order of the seeds."""
    if jobs == 1:
        yield from map(run, seeds)
        return
    ahead = iter(seeds)
    with ProcessPoolExecutor(jobs) as pool:
        running: list[Future[list[Outcome]]] = []
        while True:
            while len(running) < 2 * jobs and (chunk := list(islice(ahead, CHUNK))):
                running.append(pool.submit(_run_chunk, run, chunk))
            if not running:
                return
            yield from running.pop(0).result()


def _run_chunk(run: Run, seeds: list[int]) -> list[Outcome]:
    return [run(seed) for seed in seeds]


def summarize(outcomes: list[Outcome], wall_s: float) -> dict[str, object]:
    codes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for outcome in outcomes:
        codes.update(dict(outcome.codes))
        faults.update(outcome.faults)
    requests = sum(codes.values())
    failed = sum(n for code, n in codes.items() if code not in GOOD_ENDS)
    return {
        "seeds": len(outcomes),
        "failed_seeds": [outcome.seed for outcome in outcomes if outcome.violations],
        "requests": requests,
        "requests_by_code": dict(sorted(codes.items())),
        "error_share": failed / requests if requests else 0.0,
        "faults": dict(sorted(faults.items())),
        "virtual_s": round(sum(outcome.virtual_s for outcome in outcomes), 1),
        "wall_s": round(wall_s, 2),
        "seconds_per_seed": round(wall_s / len(outcomes), 4) if outcomes else 0.0,
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sim.faults", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    parser.add_argument("--seed", type=int, help="replay this one alone")
    parser.add_argument("--conductors", action="store_true", help="several of them: see the docs")
    parser.add_argument("--verbose", action="store_true", help="print the event log in any case")
    parser.add_argument("--errors", action="store_true", help="print requests that failed rightly")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--json", help="file for the summary")
    return parser.parse_args(arguments)


def _show(outcome: Outcome, whole: bool = True) -> None:
    lines = outcome.log if whole else outcome.log[-60:]
    for line in lines:
        sys.stdout.write(f"{line}\n")
    for violation in outcome.violations:
        sys.stdout.write(f"VIOLATION {violation}\n")


def _headline(outcome: Outcome, several: bool) -> str:
    verdict = f"{len(outcome.violations)} violations" if outcome.violations else "ok"
    codes = " ".join(f"{code}={count}" for code, count in outcome.codes)
    faults = ", ".join(outcome.faults) or "none"
    family = " --conductors" if several else ""
    replay = (
        f"\n  replay: python -m sim.faults{family} --seed {outcome.seed} --verbose"
        if outcome.violations
        else ""
    )
    return (
        f"seed {outcome.seed}: {verdict}; {codes}; faults: {faults}; "
        f"{outcome.virtual_s:.1f} s{f'; log {outcome.digest}' if outcome.digest else ''}{replay}"
    )


def _summary_line(summary: dict[str, object]) -> str:
    failed = summary["failed_seeds"]
    wrong = f"{len(failed)} FAILED {failed}" if isinstance(failed, list) and failed else "all right"
    return (
        f"{summary['seeds']} seeds, {wrong}; {summary['requests']} requests "
        f"{summary['requests_by_code']}, {summary['error_share']:.4f} ended in errors; "
        f"{summary['virtual_s']} s of virtual time in {summary['wall_s']} s "
        f"({summary['seconds_per_seed']} s per seed)"
    )


if __name__ == "__main__":
    sys.exit(main())
