"""The metrics of a worker process: of its engine, its handoffs, and what it fetches."""

from __future__ import annotations

from baton.engine.figures import EngineFigures, Source
from baton.kv.handoff.figures import HandoffFigures
from baton.telemetry import Metrics
from baton.types.kv_events import Tier
from baton.worker.member_metrics import MemberMetrics

_FETCHES = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class WorkerMetrics(MemberMetrics):
    """Of a worker, over all its lives."""

    def __init__(self) -> None:
        super().__init__("worker")
        self.engine = EngineFigures(self.own)
        self.handoff = HandoffFigures(self.own)
        self.fetches = FetchFigures(self.own, self.engine)


class FetchFigures:
    """Of KV that was read from other workers' pools and from stores."""

    def __init__(self, metrics: Metrics, engine: EngineFigures) -> None:
        self._hits = engine.hits
        self.seconds = metrics.distributions(
            "baton_fetch_seconds",
            "Time to read what a worker lacked of a prefix, by the tier that it was in.",
            _FETCHES,
            "tier",
            Tier,
        )
        self.bytes = metrics.tallies("baton_fetch_bytes", "KV that was read so.", "tier", Tier)
        self.failures = metrics.tallies(
            "baton_fetch_failures",
            "Reads that brought less than was wanted: the rest was computed.",
            "tier",
            Tier,
        )

    def note(self, tier: Tier, seconds: float, tokens: int, nbytes: int, complete: bool) -> None:
        """Of one source."""
        self.seconds[tier].observe(seconds)
        self.bytes.add(tier, nbytes)
        self._hits.add(Source.of(tier), tokens)
        self.failures.add(tier, int(not complete))
