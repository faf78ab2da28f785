"""How far a simulation is, on standard error, if somebody is there to see it."""

from __future__ import annotations

import sys
import time

LOOK_S = 0.5  # of real time, between two looks at the line


class ProgressLine:
    """Of one simulation of so many requests: `update` is a `sim.fleet.run.Progress`."""

    def __init__(self, total: int, label: str = "") -> None:
        self._total = total
        self._label = label and f"{label} "
        self._next = 0.0
        self._shown = sys.stderr.isatty()

    def update(self, ended: int, now: float) -> None:
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LOOK_S
        done = 30 * ended // max(self._total, 1)
        bar = "#" * done + "." * (30 - done)
        count = f"{ended:,} of {self._total:,} requests, {now:,.0f} s simulated"
        sys.stderr.write(f"\r{self._label}[{bar}] {count}")
        sys.stderr.flush()

    def clear(self) -> None:
        """What is written next takes its place."""
        if self._shown:
            sys.stderr.write("\r\033[K")
