"""How long to fuzz: a few fixed cases in CI, or as many as fit into FUZZ_MINUTES per file.

    FUZZ_MINUTES=10 python -m pytest tests/fuzz/test_streams.py     (`make fuzz MINUTES=10`)

With FUZZ_REPORT=FILE each test appends a JSON line: its name, cases and seconds.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

Value = TypeVar("Value")

MINUTES = float(os.environ.get("FUZZ_MINUTES", "0"))
REPORT = os.environ.get("FUZZ_REPORT", "")


@dataclass(frozen=True)
class Campaign:
    """Of one test. `seconds` is 0 for the short version, whose cases are always the same."""

    name: str
    seconds: float = 0.0

    @property
    def short(self) -> bool:
        return self.seconds == 0

    def run(
        self, strategy: SearchStrategy[Value], check: Callable[[Value], None], examples: int
    ) -> None:
        """`check` cases of `strategy`: `examples` of them, or rounds of `examples` until the time
        is over. A failing case is made small and shown."""
        began, count, failed = time.monotonic(), 0, False

        def one(value: Value) -> None:
            nonlocal count, failed
            if not self.short and not failed and time.monotonic() - began > self.seconds:
                return  # the rest of the last round
            count += 1
            try:
                check(value)
            except BaseException:
                failed = True
                raise

        for number in itertools.count(time.time_ns()):
            case = seed(number)(given(strategy)(one)) if not self.short else given(strategy)(one)
            settings(
                max_examples=examples,
                derandomize=self.short,
                database=None,
                deadline=None,
                report_multiple_bugs=False,
                phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck),
            )(case)()
            if time.monotonic() - began >= self.seconds:
                break
        self._note(count, time.monotonic() - began)

    def _note(self, cases: int, seconds: float) -> None:
        if REPORT:
            line = {"test": self.name, "cases": cases, "seconds": round(seconds, 1)}
            with Path(REPORT).open("a") as file:
                file.write(json.dumps(line) + "\n")


class ErrorLog(logging.Handler):
    """Everything that was logged as an error, with its traceback: each is a finding."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))

    def check(self) -> None:
        lines, self.lines = self.lines, []
        assert not lines, "\n".join(lines)
