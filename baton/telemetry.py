"""Logs and metrics of a process. Logs: one line per record on stderr. Metrics: `baton_*`."""

from __future__ import annotations

import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

LEVELS = ("debug", "info", "warning", "error")


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO decode-0 baton.worker: message`, tracebacks included."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        stamp = f"{seconds}.{int(record.msecs):03d}Z"
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        line = text.replace("\r", "").replace("\n", " | ")
        return f"{stamp} {record.levelname} {self._process} {record.name}: {line}"


def setup_logging(level: str, process: str, stream: TextIO | None = None) -> None:
    """Send every record of `level` (one of LEVELS) and above to stderr. Replaces older handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(process))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


class Tally(Collector):
    """A counter for what happens per token: without the lock and the checks of the library's, which
    take longer than the rest of the work. Incremented by one thread."""

    def __init__(self, name: str, help: str) -> None:
        self._name = name
        self._help = help
        self.value = 0

    def collect(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self._name, self._help, value=self.value)]


class Distribution(Collector):
    """A histogram for what happens per token; see Tally. `bounds` ascend."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._help = help
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        return [HistogramMetricFamily(self._name, self._help, buckets, self._sum)]


class Metrics:
    """The metrics of one process, in a registry of its own. Names start with `baton_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(_checked(name), help, labels, registry=self.registry)

    def gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(_checked(name), help, labels, registry=self.registry)

    def histogram(
        self, name: str, help: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        return Histogram(_checked(name), help, labels, buckets=buckets, registry=self.registry)

    def tally(self, name: str, help: str) -> Tally:
        metric = Tally(_checked(name), help)
        self.registry.register(metric)
        return metric

    def distribution(self, name: str, help: str, bounds: Sequence[float]) -> Distribution:
        metric = Distribution(_checked(name), help, bounds)
        self.registry.register(metric)
        return metric

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)


def _checked(name: str) -> str:
    if not name.startswith("baton_"):
        raise ValueError(f"metric {name} must be called baton_{name}")
    return name
