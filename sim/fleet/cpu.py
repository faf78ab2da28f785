"""Whose CPU time a simulation takes: the conductor's, that of workers and stores, or its own.

Told by samples of the stack, so that nothing that is simulated can tell.
"""

from __future__ import annotations

import resource
import signal
import time
from collections import Counter
from collections.abc import Iterator
from types import FrameType

from sim.workload.trace import Request

SAMPLE_S = 0.005  # of CPU time
CONDUCTOR, WORKERS, SIMULATOR = "conductor", "workers", "simulator"
_WORKERS = frozenset({"baton", "decode_worker", "elastic_worker", "kvstore", "prefill_worker"})


class CpuMeter:
    """Counts from the first request until `count` have ended: without the start and the end of all
    processes. For the main thread; one at a time."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._samples: Counter[str] = Counter()
        self._began_s = self.seconds = 0.0

    def watch(self, requests: Iterator[Request]) -> Iterator[Request]:
        """The same requests; counting begins when the first one is asked for."""
        signal.signal(signal.SIGPROF, self._sample)
        self._began_s = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)
        yield from requests

    def note(self, ended: int) -> None:
        """So many have ended."""
        if ended == self._count:
            self.stop()

    def stop(self) -> None:
        """May be said again."""
        if self._began_s:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            self.seconds, self._began_s = time.process_time() - self._began_s, 0.0

    def describe(self) -> str:
        total, count = sum(self._samples.values()), max(self._count, 1)
        parts = [f"CPU {self.seconds:.1f} s, per request {1e3 * self.seconds / count:.2f} ms"]
        for name in (CONDUCTOR, WORKERS, SIMULATOR):
            share_s = self.seconds * self._samples[name] / max(total, 1)
            parts.append(f"{name} {1e3 * share_s / count:.2f} ms")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        parts.append(f"at most {peak:,.0f} MiB of memory")
        return ", ".join(parts)

    def _sample(self, number: int, frame: FrameType | None) -> None:
        self._samples[whose(frame)] += 1


def whose(frame: FrameType | None) -> str:
    """The conductor's is what it runs or has called; the same for workers. What drives both is the
    simulator's, the event loop with it."""
    found = SIMULATOR
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package == "conductor":
            return CONDUCTOR
        if package in _WORKERS:
            found = WORKERS
        frame = frame.f_back
    return found
