"""`python -m sim.faults`: run many seeds of the fault harness, or replay one.

One seed is one exactly repeatable run. Exit status 1 when anything was wrong in any of them.
A long run is best made in parts: `python -m sim.faults sum FILE...` adds up what `--json` wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from sim.run import GOOD_ENDS, Outcome, run_seed, run_seed_of_several

CHUNK = 10  # seeds that a process gets at a time
Run = Callable[[int], Outcome]
_EMPTY = {"seeds": 0, "failed_seeds": [], "requests_by_code": {}, "faults": {}, "virtual_s": 0.0}
SHOWN = 5  # failing seeds whose logs are printed


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["sum"]:
        parts = [json.loads(Path(file).read_text()) for file in arguments[1:]]
        sys.stdout.write(json.dumps(add_up(parts), indent=2) + "\n")
        return 0
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


def summarize(outcomes: Sequence[Outcome], wall_s: float) -> dict[str, object]:
    """What a run came to; plain, for JSON."""
    parts = [
        {
            "seeds": 1,
            "failed_seeds": [one.seed] if one.violations else [],
            "requests_by_code": dict(one.codes),
            "faults": Counter(one.faults),
            "virtual_s": one.virtual_s,
            "wall_s": 0.0,
        }
        for one in outcomes
    ]
    return add_up([*parts, {**_EMPTY, "wall_s": wall_s}])


def add_up(parts: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The summary of several runs together."""
    codes: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    for part in parts:
        codes.update(part["requests_by_code"])
        faults.update(part["faults"])
    seeds, requests = sum(part["seeds"] for part in parts), sum(codes.values())
    failed = sum(n for code, n in codes.items() if code not in GOOD_ENDS)
    wall_s = sum(part["wall_s"] for part in parts)
    return {
        "seeds": seeds,
        "failed_seeds": [seed for part in parts for seed in part["failed_seeds"]],
        "requests": requests,
        "requests_by_code": dict(sorted(codes.items())),
        "error_share": failed / requests if requests else 0.0,
        "faults": dict(sorted(faults.items())),
        "virtual_s": round(sum(part["virtual_s"] for part in parts), 1),
        "wall_s": round(wall_s, 2),
        "seconds_per_seed": round(wall_s / seeds, 4) if seeds else 0.0,
    }


def _parse(arguments: list[str]) -> argparse.Namespace:
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
