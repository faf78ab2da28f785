"""What is simulated: one frozen value, that a result carries and that makes it again."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any

from baton.errors import ConfigError
from sim.costs.overheads import NO_OVERHEAD, OVERHEADS
from sim.fleet.prompts import BLOCK_TOKENS

_CLUSTER = re.compile(r"(?:(?P<prefill>[1-9]\d*)P\+)?(?P<rest>[1-9]\d*)(?P<kind>[DM])")


class Cache(StrEnum):
    """What becomes of the KV of a prompt when its request has ended."""

    NONE = "none"  # nothing is reused
    LOCAL = "local"  # each node reuses what it has computed itself
    GLOBAL = "global"  # nodes read it from each other


class Admission(StrEnum):
    """Whom the conductor turns away early, because the SLOs would be missed."""

    OFF = "off"
    ASSIGNED = "assigned"  # with all that the workers were given
    LOAD = "load"  # with what decodes now
    PREDICTION = "prediction"  # with what will decode when the prompt is computed


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """Sizes in tokens, times in seconds. A worker is a node. Raises ConfigError."""

    cluster: str  # "8P+8D": disaggregated; "16M": each computes prompts and decodes
    model: str = "llama3-70b"
    node: str = "8xA800"
    network_gbps: float = 0.0  # of a node's NICs together; 0: what the node has
    tensor_parallel: int = 0  # GPUs of a worker; 0: all of its node
    elastic: bool = False  # workers change between prefill and decode with the load
    grain: int = 16  # tokens of a unit
    policy: str = "cache-aware"
    cache: Cache = Cache.GLOBAL
    kv_blocks: int = 0  # of a worker's pool; 0: what the node has room for
    store_blocks: int = 0  # of the CPU tier of each node that computes prompts; 0: there is none
    nvme_blocks: int = 0  # of the NVMe tier behind it; 0: there is none
    eviction: str = "lru"  # of the CPU tier
    admission: Admission = Admission.OFF
    slo_ttft_s: float = 30.0
    slo_tbt_s: float = 0.2
    patience: float = 0.0  # seconds for which a prompt may be overtaken, per second that it takes
    local_tokens: int = 0  # most that a decode worker prefills itself; -1: where costs say so
    chunk_tokens: int = 8192  # prompt tokens of a step of a prefill worker
    mixed_tokens: int = 512  # and of a step of a worker that decodes, too
    prompts_first: bool = False  # workers that do both decode only when no prompt can be computed
    overheads: str = NO_OVERHEAD  # of another engine than the machine's preset is of
    max_seqs: int = 256  # that decode together
    max_model_len: int = 1 << 18
    deadline_s: float = 3600.0  # of a request
    seed: int = 0

    def __post_init__(self) -> None:
        match = _CLUSTER.fullmatch(self.cluster)
        if match is None or (match["kind"] == "M" and match["prefill"]):
            raise ConfigError(f"a cluster is nP+mD or nM, as 8P+8D or 16M, not {self.cluster!r}")
        if self.grain < 1 or BLOCK_TOKENS % self.grain or self.grain > BLOCK_TOKENS // 2:
            raise ConfigError(f"the grain must divide {BLOCK_TOKENS // 2}, not be {self.grain}")
        if self.nvme_blocks and not self.store_blocks:
            raise ConfigError("an NVMe tier is behind a CPU tier: give it --store-blocks")
        if self.chunk_tokens < self.grain:
            raise ConfigError(f"a chunk has {self.grain} tokens (--grain) or more")
        if self.elastic and not (self.prefill and self.prefill + self.decode > 2):
            raise ConfigError(f"{self.cluster} cannot be elastic: it takes nP+mD, three or more")
        if self.overheads not in OVERHEADS:
            raise ConfigError(f"overheads are {', '.join(OVERHEADS)}, not {self.overheads!r}")

    @property
    def prefill(self) -> int:
        """Workers that only compute prompts."""
        return int(self._match["prefill"] or 0)

    @property
    def decode(self) -> int:
        """Workers that decode; they compute prompts, too, where nobody else does."""
        return int(self._match["rest"])

    @property
    def coupled(self) -> bool:
        return self._match["kind"] == "M"

    @property
    def _match(self) -> re.Match[str]:
        match = _CLUSTER.fullmatch(self.cluster)
        assert match is not None
        return match

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> FleetSpec:
        """Raises ConfigError for unknown fields."""
        known = {field.name for field in fields(cls)}
        if unknown := data.keys() - known:
            raise ConfigError(f"a fleet has no {', '.join(sorted(unknown))}")
        enums = {"cache": Cache(data["cache"]), "admission": Admission(data["admission"])}
        return cls(**data | enums)
