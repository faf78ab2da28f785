"""Metrics of a process for Prometheus, all named `baton_*`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

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
from baton.counts import Buckets, Counts, Distributions, Tallies, Tally

# Twice as many series, for what the first scrape after a restart shows as well.
disable_created_metrics()  # type: ignore[no-untyped-call]


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


class _Exported(Collector):
    """What is counted elsewhere, as it is when it is scraped."""

    def __init__(self, family: Callable[[], Metric]) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return [self._family()]


class Metrics(Counts):
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
        tally = super().tally(_checked(name), help)
        self._export(lambda: CounterMetricFamily(name, help, value=tally.value))
        return tally

    def tallies(self, name: str, help: str, label: str, values: Iterable[str]) -> Tallies:
        tallies = super().tallies(_checked(name), help, label, values)

        def family() -> Metric:
            family = CounterMetricFamily(name, help, labels=[label])
            for value, count in tallies.items():
                family.add_metric([value], count)
            return family

        self._export(family)
        return tallies

    def distribution(self, name: str, help: str, bounds: Sequence[float]) -> Buckets:
        buckets = super().distribution(_checked(name), help, bounds)
        self._export(lambda: HistogramMetricFamily(name, help, buckets.cumulated(), buckets.sum))
        return buckets

    def distributions(
        self, name: str, help: str, bounds: Sequence[float], label: str, values: Iterable[str]
    ) -> Distributions:
        parts = super().distributions(_checked(name), help, bounds, label, values)

        def family() -> Metric:
            family = HistogramMetricFamily(name, help, labels=[label])
            for value, part in parts.items():
                family.add_metric([value], part.cumulated(), part.sum)
            return family

        self._export(family)
        return parts

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

    def _export(self, family: Callable[[], Metric]) -> None:
        self.registry.register(_Exported(family))


def _checked(name: str) -> str:
    if not name.startswith("baton_"):
        raise ValueError(f"metric {name} must be called baton_{name}")
    return name
