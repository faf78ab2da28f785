"""CPUs: which ones a process may use, how they are written, how workers share them."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MOST = 1 << 14  # more than any machine has: "0-99999999999" must not fill the memory


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a worker computes: one thread on each of the first `threads` of its `cpus`."""

    cpus: tuple[int, ...]
    threads: int

    def apply(self) -> None:
        """Bind this process, and what it will start, to its CPUs. To be called before torch is
        imported: OpenMP looks at CPUs and environment once."""
        bind(self.cpus)
        os.environ["OMP_NUM_THREADS"] = str(self.threads)


def bind(cpus: Sequence[int]) -> None:
    """Keep this process, with the threads that libraries began when they were imported, and what
    it will start, on these CPUs."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), cpus)


def choose_placement(cpus: str, threads: int) -> Placement:
    """From the options `--cpus` (empty: all that this process may run on) and `--threads`
    (0: one per CPU, as far as a container's quota allows). Raises ConfigError."""
    allowed = available_cpus()
    chosen = parse_cpus(cpus) if cpus else allowed
    if missing := set(chosen) - set(allowed):
        raise ConfigError(
            f"--cpus {cpus}: this process may not run on {format_cpus(sorted(missing))}; "
            f"it has {format_cpus(allowed)}"
        )
    if threads > len(chosen):
        raise ConfigError(
            f"--threads {threads} is more than the {len(chosen)} CPUs of this worker "
            f"({format_cpus(chosen)}): give it fewer threads or more --cpus"
        )
    quota = cpu_quota()
    most = len(chosen) if quota is None else max(1, min(len(chosen), math.floor(quota)))
    return Placement(chosen, threads or most)


def parse_cpus(text: str) -> tuple[int, ...]:
    """The CPUs of a list such as `0-3,8`, ascending. Raises ConfigError."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < _MOST:
            raise ConfigError(f"CPUs are given as a list such as 0-3,8, not {text!r}")
        cpus.update(range(first, last + 1))
    return tuple(sorted(cpus))


def format_cpus(cpus: Sequence[int]) -> str:
    """The inverse of `parse_cpus`."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][-1] + 1:
            runs[-1][1:] = [cpu]
        else:
            runs.append([cpu])
    return ",".join("-".join(map(str, run)) for run in runs)


def available_cpus() -> tuple[int, ...]:
    """The CPUs that this process may run on, ascending."""
    return tuple(sorted(os.sched_getaffinity(0)))


def cpu_quota(root: Path = CGROUP) -> float | None:
    """How many CPUs' worth of time this container may use (cgroup v2 or v1); None: no bound."""
    try:
        quota, period = (root / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = (root / "cpu/cpu.cfs_quota_us").read_text()
            period = (root / "cpu/cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        share = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # v2 says "max"
        return None
    return share if share > 0 else None  # v1 says -1


def share_cpus(cpus: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    """A set for each worker: disjoint, contiguous and of nearly the same size; with fewer CPUs
    than workers, one CPU each, which several share."""
    if workers > len(cpus):
        return [(cpus[worker % len(cpus)],) for worker in range(workers)]
    cuts = [len(cpus) * worker // max(1, workers) for worker in range(workers + 1)]
    return [tuple(cpus[begin:end]) for begin, end in itertools.pairwise(cuts)]
