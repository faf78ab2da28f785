"""The configuration of a worker process, the same for both kinds."""

from __future__ import annotations

from dataclasses import dataclass

from baton.config import option, require
from baton.cpus import parse_cpus
from baton.worker.address import is_address
from baton.worker.links import ORPHAN_S
from baton.worker.member_options import MemberOptions

KERNELS = ("auto", "native", "reference", "triton", "flash")
"""See `baton.engine.make_runner`."""


@dataclass(frozen=True, slots=True)
class WorkerConfig(MemberOptions):
    """See `--help`. Raises ConfigError for values that cannot work."""

    name: str = option("", "name in the fleet and in logs; empty: role, host and process id")
    node: str = option("", "host that this process is on, for its store; empty: the host's name")
    store: str = option("", "host:port of this node's store; empty: none")
    dtype: str = option("auto", "of weights and KV", choices=("auto", "float32", "bfloat16"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    kernels: str = option("auto", "what computes; auto: the fastest here", choices=KERNELS)
    block_size: int = option(32, "tokens of a KV block: 16, 32, 64, 128 or 256")
    num_blocks: int = option(0, "KV blocks; 0: as many as --kv-memory-mib holds")
    kv_memory_mib: int = option(
        0, "KV memory; 0: most of a GPU's free memory, half of a CPU's, there at most 4096"
    )
    memory_share: float = option(
        1.0, "part of the free memory to count on, where several workers share it"
    )
    max_num_seqs: int = option(64, "sequences that run at a time")
    max_batch_tokens: int = option(2048, "tokens of one step")
    max_prefill_tokens: int = option(0, "prompt tokens of a step that also decodes; 0: no bound")
    prompts_first: bool = option(
        False, "decode only when no prompt can be computed: sooner first tokens, longer gaps"
    )
    max_model_len: int = option(0, "tokens of prompt and answer together; 0: the model's")
    max_waiting: int = option(1024, "sequences that may wait; more are refused")
    transport: str = option(
        "auto", "how KV moves between workers", choices=("auto", "nixl", "nccl", "shm")
    )
    verify: str = option("sample", "digests of handed-over KV", choices=("off", "sample", "full"))
    lease_ttl: float = option(10.0, "seconds until published KV that nobody renews returns")
    layer_groups: int = option(4, "groups of layers in which a chunk's KV is published")
    # A group costs each worker about half a millisecond of CPU; 8 MiB take 2 ms to copy.
    by_layers_kib: int = option(8192, "chunks with less KV than this are published in one piece")
    early_prefill: str = option(
        "auto",
        "begin when the first layers of a fetched prefix have come; auto: where the transfer "
        "does not take the CPUs that compute",
        choices=("auto", "on", "off"),
    )
    cpus: str = option("", "CPUs of this process, as 0-3,8; empty: all that it may run on")
    threads: int = option(0, "CPU threads of the model; 0: one on each of its CPUs")
    prefix_caching: bool = option(True, "reuse the KV of common prefixes")
    orphan_timeout: float = option(
        ORPHAN_S,
        "with --redis: seconds that an answer goes on for others when its conductor has gone",
    )

    def __post_init__(self) -> None:
        MemberOptions.__post_init__(self)  # not super(): a class with slots is made anew
        for name in ("max_num_seqs", "max_batch_tokens", "max_waiting", "layer_groups"):
            require(getattr(self, name) >= 1, name, "at least 1")
        bounds = ("num_blocks", "kv_memory_mib", "max_prefill_tokens", "max_model_len")
        for name in (*bounds, "by_layers_kib", "threads", "orphan_timeout"):
            require(getattr(self, name) >= 0, name, "at least 0")
        require(0 < self.memory_share <= 1, "memory_share", "more than 0 and at most 1")
        require(self.lease_ttl > 0, "lease_ttl", "more than 0 seconds")
        if self.cpus:
            parse_cpus(self.cpus)
        require(not self.store or is_address(self.store), "store", "host:port")
