"""Options of the store; see `baton.config` for where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import option
from baton.errors import ConfigError
from baton.logs import LEVELS
from baton.worker.address import is_address
from baton.worker.cluster_options import ClusterOptions
from kvstore.eviction import POLICIES


@dataclass(frozen=True, slots=True)
class StoreConfig(ClusterOptions):
    """See `--help`. Raises ConfigError for values that cannot work."""

    name: str = option("", "name in the fleet and in logs; empty: store and the node's name")
    node: str = option("", "host that this process is on; empty: the host's name")
    conductor: tuple[str, ...] = option((), "host:port of the gRPC servers of conductors")
    model: str = option("", "model directory or hub id; empty: the built-in demo model")
    model_name: str = option("", "served name; empty: the model's last part")
    dtype: str = option(
        "auto", "of the workers' KV; auto: as on a CPU", choices=("auto", "float32", "bfloat16")
    )
    block_size: int = option(32, "tokens of a KV block, as the workers have it")
    listen: str = option("127.0.0.1:0", "host:port of this store's gRPC server; port 0: any")
    advertise: str = option("", "host or host:port that others reach it by; empty: what it bound")
    metrics_port: int = option(
        0, "port of /metrics and /health over HTTP, on the host of --listen; 0: none"
    )
    health_port: int = option(
        0, "port of gRPC's health service alone, without TLS, on the host of --listen; 0: none"
    )
    memory_mib: int = option(1024, "CPU tier: blocks in shared memory")
    memory_dir: str = option("/dev/shm", "file system of the CPU tier")
    memory_name: str = option("", "of its files there, one store each; empty: the store's name")
    keep_memory: bool = option(
        True, "leave the CPU tier where it is at an orderly stop, for the next start"
    )
    disk_dir: str = option("", "directory of the NVMe tier; empty: none")
    disk_gib: float = option(64.0, "NVMe tier: space that it may take")
    disk_segment_mib: int = option(256, "NVMe tier: size of a file; room is made by whole files")
    pin_share: float = option(0.5, "of the CPU tier that pinned blocks (cache_pin_s) may take")
    eviction: str = option("lru", "which block goes first", choices=tuple(POLICIES))
    transport: str = option("auto", "how KV moves", choices=("auto", "nixl", "nccl", "shm"))
    verify: str = option("sample", "digests of lent KV", choices=("off", "sample", "full"))
    lease_ttl: float = option(10.0, "seconds until a loan that nobody renews ends")
    log_level: str = option("info", "least level that is logged", choices=LEVELS)
    drain_timeout: float = option(5.0, "seconds that readers get at SIGTERM")
    exit_with_parent: bool = option(False, "end when standard input is closed")

    def __post_init__(self) -> None:
        _require(self.memory_mib >= 1, "memory_mib", "at least 1")
        _require(self.disk_gib > 0, "disk_gib", "more than 0")
        _require(self.disk_segment_mib >= 1, "disk_segment_mib", "at least 1")
        _require(0 <= self.pin_share <= 0.9, "pin_share", "0 to 0.9: other blocks need room, too")
        _require(0 <= self.metrics_port <= 65535, "metrics_port", "from 0 to 65535")
        _require(self.lease_ttl > 0, "lease_ttl", "more than 0 seconds")
        _require(self.drain_timeout >= 0, "drain_timeout", "at least 0")
        _require(is_address(self.listen), "listen", "host:port")
        _require(0 <= self.health_port <= 65535, "health_port", "from 0 to 65535")
        _require(all(map(is_address, self.conductor)), "conductor", "host:port")

    @property
    def health_listen(self) -> str:
        """Where probes without a certificate ask. Empty: nowhere."""
        return f"{self.listen.rpartition(':')[0]}:{self.health_port}" if self.health_port else ""


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise ConfigError(f"--{name.replace('_', '-')} must be {what}")
