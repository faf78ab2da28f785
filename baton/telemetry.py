"""Logs and metrics of a process. Logs: one line per record on stderr. Metrics: `baton_*`."""

from __future__ import annotations

import logging
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import TextIO

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from baton import __version__
from baton.types.trace import TraceContext

LEVELS = ("debug", "info", "warning", "error")

_trace: ContextVar[TraceContext | None] = ContextVar("trace", default=None)


@contextmanager
def traced(context: TraceContext | None) -> Iterator[None]:
    """What is logged meanwhile, and by tasks that are made meanwhile, says the trace's id."""
    before = _trace.set(context)
    try:
        yield
    finally:
        _trace.reset(before)


# Twice as many series, for what the first scrape after a restart shows as well.
disable_created_metrics()  # type: ignore[no-untyped-call]


class LineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO decode-0 baton.worker: message`, tracebacks included; behind
    it the trace that it is about, if there is one: `trace=0af7651916cd43dd8448eb211c80319c`."""

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
        if (context := _trace.get()) is not None:
            line = f"{line} trace={context.trace_id}"
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


class Tallies(Collector):
    """Tallies by one label. All its values are said at the start: nobody can add others, and each
    is exported from the start on, so that rates see its first event."""

    def __init__(self, name: str, help: str, label: str, values: Iterable[str]) -> None:
        self._name = name
        self._help = help
        self._label = label
        self._counts = dict.fromkeys(map(str, values), 0)

    def add(self, value: str, count: int = 1) -> None:
        """Raises KeyError for a label that was not said."""
        self._counts[value] += count

    def __getitem__(self, value: str) -> int:
        return self._counts[value]

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._help, labels=[self._label])
        for value, count in self._counts.items():
            family.add_metric([value], count)
        return [family]


class Buckets:
    """How often values fell below each of `bounds`, which ascend."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def cumulated(self) -> list[tuple[str, float]]:
        """As histograms are exported."""
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))


class Distribution(Buckets, Collector):
    """A histogram for what happens per token; see Tally."""

    def __init__(self, name: str, help: str, bounds: Sequence[float]) -> None:
        super().__init__(bounds)
        self._name = name
        self._help = help

    def collect(self) -> Iterable[Metric]:
        return [HistogramMetricFamily(self._name, self._help, self.cumulated(), self.sum)]


class Distributions(Collector):
    """Distributions by one label; see Tallies."""

    def __init__(
        self, name: str, help: str, bounds: Sequence[float], label: str, values: Iterable[str]
    ) -> None:
        self._name = name
        self._help = help
        self._label = label
        self._parts = {str(value): Buckets(bounds) for value in values}

    def __getitem__(self, value: str) -> Buckets:
        """Raises KeyError for a label that was not said."""
        return self._parts[value]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._help, labels=[self._label])
        for value, part in self._parts.items():
            family.add_metric([value], part.cumulated(), part.sum)
        return [family]


@dataclass(frozen=True, slots=True)
class Snapshot(Collector):
    """Metrics as they were. Of many, most of the time goes into their text: another thread may
    make it."""

    families: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        return self.families

    def encode(self, accept: str) -> tuple[bytes, str]:
        """The exposition in the format that a scraper's `Accept` asks for, and its content type.
        Only OpenMetrics has exemplars."""
        encode, content_type = choose_encoder(accept)
        return encode(self), content_type


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

    def tallies(self, name: str, help: str, label: str, values: Iterable[str]) -> Tallies:
        metric = Tallies(_checked(name), help, label, values)
        self.registry.register(metric)
        return metric

    def distributions(
        self, name: str, help: str, bounds: Sequence[float], label: str, values: Iterable[str]
    ) -> Distributions:
        metric = Distributions(_checked(name), help, bounds, label, values)
        self.registry.register(metric)
        return metric

    def add_process(self, kind: str) -> None:
        """What every process exports: its version, and what it takes of the machine."""
        info = self.gauge("baton_process_info", "1, for its labels.", ["kind", "version"])
        info.labels(kind, __version__).set(1)
        ProcessCollector(registry=self.registry)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def render_for(self, accept: str) -> tuple[bytes, str]:
        """See `Snapshot.encode`."""
        return self.snapshot().encode(accept)

    def snapshot(self) -> Snapshot:
        return Snapshot(tuple(self.registry.collect()))


def _checked(name: str) -> str:
    if not name.startswith("baton_"):
        raise ValueError(f"metric {name} must be called baton_{name}")
    return name
