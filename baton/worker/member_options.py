"""Options of every member of the fleet, workers and stores alike: whom it serves, and where."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import option, require
from baton.logs import LEVELS
from baton.rpc.tls import FOR_SCRAPERS
from baton.worker.address import is_address
from baton.worker.cluster_options import ClusterOptions


@dataclass(frozen=True, slots=True)
class MemberOptions(ClusterOptions):
    """Raises ConfigError for values that cannot work."""

    conductor: tuple[str, ...] = option((), "host:port of the gRPC servers of conductors")
    model: str = option("", "model directory or hub id; empty: the built-in demo model")
    model_name: str = option("", "served name; empty: the model's last part")
    listen: str = option("127.0.0.1:0", "host:port of this process's gRPC server; port 0: any")
    advertise: str = option("", "host or host:port that others reach it by; empty: what it bound")
    metrics_port: int = option(
        0, "port of /metrics and /health over HTTP, on the host of --listen; 0: none"
    )
    metrics_tls: str = option(
        "mutual",
        "with --tls-cert, who may read --metrics-port: mutual: who shows a certificate of the "
        "cluster; server: everybody, by HTTPS; off: everybody, by HTTP",
        choices=FOR_SCRAPERS,
    )
    health_port: int = option(
        0, "port of gRPC's health service alone, without TLS, on the host of --listen; 0: none"
    )
    log_level: str = option("info", "least level that is logged", choices=LEVELS)
    drain_timeout: float = option(30.0, "seconds that running requests get at SIGTERM")
    exit_with_parent: bool = option(False, "end when standard input is closed")

    def __post_init__(self) -> None:
        require(all(map(is_address, self.conductor)), "conductor", "host:port")
        require(is_address(self.listen), "listen", "host:port")
        require(0 <= self.metrics_port <= 65535, "metrics_port", "from 0 to 65535")
        require(0 <= self.health_port <= 65535, "health_port", "from 0 to 65535")
        require(self.drain_timeout >= 0, "drain_timeout", "at least 0")

    @property
    def health_listen(self) -> str:
        """Where probes without a certificate ask. Empty: nowhere."""
        return f"{self.listen.rpartition(':')[0]}:{self.health_port}" if self.health_port else ""
