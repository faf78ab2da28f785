"""Workers as the rest of the cluster sees them: identity, capacity, load."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from baton import __version__
from baton.types.figures import OfferCounts, StoreFigures

# Between conductors, workers and stores. One more whenever those of an older version would take a
# message for something else: then they refuse each other, with a message that says so.
PROTOCOL = 1


class Role(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    STORE = "store"  # keeps KV blocks of its node for the workers


class WorkerState(StrEnum):
    """Kept by the conductor's fleet from link and lease, never reported by the worker itself."""

    JOINING = "joining"  # registered, link not up yet
    LIVE = "live"
    SUSPECT = "suspect"  # a renewal was missed; gets no new work
    DRAINING = "draining"  # finishes what it has
    DEAD = "dead"


class BlockState(StrEnum):
    FREE = "free"
    ACTIVE = "active"
    CACHED = "cached"
    LEASED = "leased"
    QUARANTINED = "quarantined"


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Everything two processes must agree on before one may read the other's blocks.

    The pool is `[num_blocks, num_layers, 2, kv_heads, block_size, head_dim]`: one block is one
    contiguous range over all layers, and so is any run of its layers.
    """

    model: str  # model fingerprint (weights and config), hexadecimal
    dtype: str  # "float32" | "bfloat16" | "float16"
    num_layers: int
    kv_heads: int  # of this shard
    head_dim: int
    block_size: int  # tokens
    quantization: str = "none"

    @property
    def layer_bytes(self) -> int:
        """Bytes of K and V of one layer of one block."""
        width = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return 2 * self.kv_heads * self.block_size * self.head_dim * width

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_size)

    def describe(self) -> str:
        """One line for error messages that name both sides of a mismatch."""
        return (
            f"model={self.model[:12]} dtype={self.dtype} layers={self.num_layers} "
            f"kv_heads={self.kv_heads} head_dim={self.head_dim} block_size={self.block_size} "
            f"quantization={self.quantization}"
        )


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A snapshot that travels with renewals and with step reports."""

    running: int = 0  # sequences that hold blocks
    waiting: int = 0  # sequences that do not yet
    waiting_tokens: int = 0  # prompt tokens still to be computed, running and waiting
    blocks: tuple[tuple[BlockState, int], ...] = ()  # sums to the pool size
    offers: OfferCounts | None = None  # of a worker with a store
    store: StoreFigures | None = None  # of a store

    def blocks_in(self, *states: BlockState) -> int:
        return sum(count for state, count in self.blocks if state in states)


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """A worker's or store's registration. `incarnation` is new at every start of the process."""

    name: str
    role: Role
    incarnation: str
    address: str  # host:port of its gRPC server
    pid: int
    model_name: str
    layout: KvLayout
    num_blocks: int  # of the pool; a store's is its CPU tier
    max_model_len: int  # tokens, prompt and answer together; 0 of a store
    transport: str  # nixl | nccl | shm | loopback
    device: str = "cpu"
    cpus: str = ""  # that the process may run on, as 0-3,8
    threads: int = 0  # of the model on a CPU
    node: str = ""  # the host that the process is on: its store is the one of that name
    protocol: int = PROTOCOL
    version: str = __version__  # for people: what counts is `protocol`
    roles: tuple[Role, ...] = ()  # that SetRole may give it; empty: only its own
    # Operations of attention for a pair of tokens, relative to those of products for a token.
    pair_to_token: float = 0.0  # 0: not known
    step_tokens: int = 0  # that a step computes at most, which nobody can interrupt; 0: not known


@dataclass(frozen=True, slots=True)
class Peer:
    """Where to find a worker, and which life of it is meant."""

    name: str
    incarnation: str
    address: str


@dataclass(frozen=True, slots=True)
class FleetLease:
    """The conductor's answer to a registration or renewal."""

    accepted: (
        bool  # False on renewal: register again (the conductor does not know this incarnation)
    )
    ttl_s: float
