"""CPU cores that jobs share, in the loop's time: each job of a core gets an equal part of it, as
the fair scheduler of a kernel gives it.

    rate of a job = 1 / (jobs on its core) / slowdown by what the other cores compute

Cores share caches and memory bandwidth (some, the units that compute), so that a job takes longer
beside others. The slowdown is measured: `beside[kind, other]`, how many times as long a job of
one kind takes while one other core computes a job of the other. Of several other cores, what each
adds is added up; of a core with several jobs, it is their mean.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import StrEnum

_EARLY_S = 1e-9
"""A loop may call a timer so much too early."""


class Kind(StrEnum):
    """Of a job: what it needs of the memory and of the other cores' units."""

    PREFILL = "prefill"
    DECODE = "decode"
    FRONT = "front"  # everything but a model's steps: HTTP, routing, messages


Beside = Mapping[tuple[Kind, Kind], float]


@dataclass(slots=True, eq=False)
class _Job:
    kind: Kind
    remaining: float  # seconds of a core that it has alone
    done: Callable[[], object]
    rate: float = 0.0
    context: Context = field(default_factory=copy_context)


class Cores:
    """Used from the event loop only. Jobs are not stopped: a thread is not, either."""

    def __init__(self, count: int, beside: Beside) -> None:
        self._beside = beside
        self._jobs: list[list[_Job]] = [[] for _ in range(count)]
        self._settled_at = 0.0  # when every job's `remaining` was right
        self._timer: asyncio.TimerHandle | None = None
        self._context = Context()  # of no process: the machine's

    def run(self, core: int, kind: Kind, seconds: float, done: Callable[[], object]) -> None:
        """Call `done` when the core has spent so many seconds on it."""
        self._context.run(self._begin, core, _Job(kind, seconds, done))

    async def work(self, cores: Sequence[int], kind: Kind, seconds: float) -> None:
        """On the one of these cores that has least to do."""
        if seconds <= 0:
            return
        done = asyncio.Event()
        core = min(cores, key=lambda core: len(self._jobs[core]))
        self.run(core, kind, seconds, done.set)
        await done.wait()

    def _begin(self, core: int, job: _Job) -> None:
        self._settle()
        self._jobs[core].append(job)
        self._share()

    def _settle(self) -> None:
        now = asyncio.get_running_loop().time()
        passed = now - self._settled_at
        for job in self._all():
            job.remaining -= job.rate * passed
        self._settled_at = now

    def _share(self) -> None:
        """Rates until the next change, and the timer for it."""
        for number, jobs in enumerate(self._jobs):
            for job in jobs:
                job.rate = 1 / len(jobs) / self._slowdown(job.kind, number)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if waits := [max(job.remaining, 0.0) / job.rate for job in self._all()]:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(min(waits), self._due, context=self._context)

    def _slowdown(self, kind: Kind, core: int) -> float:
        added = 0.0
        for number, jobs in enumerate(self._jobs):
            if jobs and number != core:
                total = sum(self._beside.get((kind, job.kind), 1.0) - 1 for job in jobs)
                added += total / len(jobs)
        return 1 + added

    def _due(self) -> None:
        self._timer = None
        self._settle()
        loop = asyncio.get_running_loop()
        for number, jobs in enumerate(self._jobs):
            ended = [job for job in jobs if job.remaining <= _EARLY_S * job.rate]
            self._jobs[number] = [job for job in jobs if job not in ended]
            for job in ended:
                loop.call_soon(job.done, context=job.context)
        self._share()

    def _all(self) -> list[_Job]:
        return [job for jobs in self._jobs for job in jobs]
