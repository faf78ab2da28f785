"""The metrics of a process that is a member of the fleet, all named `baton_*`. Seconds and bytes.

Everything is said of the process itself: Prometheus knows from where it scraped it. Only what
conductors export, too, has the member's name as a label (`load_metrics.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from baton.kv.blocks.figures import LoanFigures
from baton.kv.identity import Identity
from baton.telemetry import Metrics
from baton.types.fleet import Role, WorkerLoad
from baton.worker.certificate_metrics import CertificateEnds
from baton.worker.load_metrics import MemberLoad, load_families
from baton.worker.monitor import LAGS, loop_lag


class MemberMetrics:
    """Of a worker or a store; what it tells of itself in its load only after `follow`."""

    def __init__(self, kind: str = "worker") -> None:
        self.own = Metrics()
        self.kv_event_lag = self.own.distribution(
            "baton_kv_event_lag_seconds",
            "Time from when there was news of KV blocks until it had been sent to a conductor.",
            LAGS,
        )
        self.loans = LoanFigures(self.own)
        self.loop_lag = loop_lag(self.own)
        self.certificates = CertificateEnds(self.own)
        self.own.add_process(kind)
        self._member: Callable[[], MemberLoad] | None = None
        self.own.registry.register(_LoadCollector(self))

    def follow(self, identity: Identity, role: Role, load: Callable[[], WorkerLoad]) -> None:
        """Export what `load` says from now on, and nothing that was followed before."""
        name, block_bytes = identity.name, identity.layout.block_bytes
        self._member = lambda: MemberLoad(name, role, block_bytes, load())

    def members(self) -> tuple[MemberLoad, ...]:
        return () if self._member is None else (self._member(),)


class _LoadCollector(Collector):
    """Asks for the load when it is scraped."""

    def __init__(self, metrics: MemberMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return load_families(self._metrics.members())
