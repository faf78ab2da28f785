"""Options of the store; see `baton.config` for where they come from."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import option, require
from baton.worker.member_options import MemberOptions
from kvstore.eviction import POLICIES


@dataclass(frozen=True, slots=True)
class StoreConfig(MemberOptions):
    """See `--help`. Raises ConfigError for values that cannot work."""

    name: str = option("", "name in the fleet and in logs; empty: store and the node's name")
    node: str = option("", "host that this process is on; empty: the host's name")
    dtype: str = option(
        "auto", "of the workers' KV; auto: as on a CPU", choices=("auto", "float32", "bfloat16")
    )
    block_size: int = option(32, "tokens of a KV block, as the workers have it")
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
    drain_timeout: float = option(5.0, "seconds that readers get at SIGTERM")

    def __post_init__(self) -> None:
        MemberOptions.__post_init__(self)  # not super(): a class with slots is made anew
        require(self.memory_mib >= 1, "memory_mib", "at least 1")
        require(self.disk_gib > 0, "disk_gib", "more than 0")
        require(self.disk_segment_mib >= 1, "disk_segment_mib", "at least 1")
        require(0 <= self.pin_share <= 0.9, "pin_share", "0 to 0.9: other blocks need room, too")
        require(self.lease_ttl > 0, "lease_ttl", "more than 0 seconds")
