"""When the certificates of a process end, as Prometheus is told."""

from __future__ import annotations

from typing import Protocol

from baton.rpc.tls import Pems
from baton.telemetry import Metrics


class Shown(Protocol):
    def current(self) -> Pems: ...


class CertificateEnds:
    """Nothing is exported before `follow`."""

    def __init__(self, metrics: Metrics) -> None:
        self._gauge = metrics.gauge(
            "baton_certificate_not_after_timestamp_seconds",
            "When the certificate ends that is shown to processes of the cluster (internal), or to "
            "clients (public), in Unix time; 0 when clients refuse it already.",
            ["use"],
        )

    def follow(self, use: str, shown: Shown | None) -> None:
        """Its files are looked at whenever somebody asks: without that, a new one would count only
        with the next connection, and connections live for weeks."""
        if shown is not None:
            self._gauge.labels(use).set_function(lambda: shown.current().ends_at)
