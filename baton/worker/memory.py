"""How many KV blocks a worker holds: from what is free, what else it needs, and what is of use.

free memory = weights + workspace of a step + KV pool + what is left to everybody else
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError
from baton.model.spec import ModelSpec
from baton.types.fleet import KvLayout
from baton.worker.config import WorkerConfig

log = logging.getLogger(__name__)

CPU_SHARE = 0.5  # of what is left for KV: the rest is for page caches and other programs
CPU_CAP_BYTES = 4 << 30  # more takes seconds to get from the kernel: only who asks gets it
CPU_MARGIN = 0.95  # of the free memory, for a pool whose size was asked for
GPU_SHARE = 0.85  # of the free memory, for weights and KV together
GPU_WORKSPACE_BYTES = 2 << 30  # activations and logits of a step, graphs, libraries
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes: what a worker may count on, and what it needs besides KV."""

    free: int
    weights: int
    workspace: int
    gpu: bool = False

    @property
    def for_kv(self) -> int:
        """The most that a pool may have, and none is left."""
        return int(self.free * (1.0 if self.gpu else CPU_MARGIN)) - self.weights - self.workspace


def choose_num_blocks(
    config: WorkerConfig, layout: KvLayout, room: Room, max_model_len: int
) -> int:
    """Raises ConfigError when what was asked for, or a single block, does not fit."""
    asked = config.num_blocks * layout.block_bytes or config.kv_memory_mib * MIB
    if asked and asked > room.for_kv:
        raise ConfigError(
            f"a KV pool of {asked // MIB} MiB does not fit: {_describe(room)}; give it at most "
            f"--kv-memory-mib {max(0, room.for_kv) // MIB}"
        )
    if config.num_blocks:
        return config.num_blocks
    useful = config.max_num_seqs * layout.blocks_for(max_model_len) * layout.block_bytes
    nbytes = asked or _default_bytes(room, config.memory_share, useful)
    if nbytes < layout.block_bytes:
        raise ConfigError(
            f"there is no room for a KV block of {layout.block_bytes} bytes: {_describe(room)}; "
            "free some memory, or use a smaller model"
        )
    log.info("KV pool of %d MiB: %s", nbytes // MIB, _describe(room))
    return nbytes // layout.block_bytes


def _default_bytes(room: Room, share: float, useful: int) -> int:
    """`useful` is what the most sequences of the greatest length take."""
    if room.gpu:
        return int(room.free * GPU_SHARE * share) - room.weights - room.workspace
    left = room.free * share - room.weights - room.workspace
    return min(int(left * CPU_SHARE), CPU_CAP_BYTES, useful)


def _describe(room: Room) -> str:
    return (
        f"{room.free // MIB} MiB are free, weights take {room.weights // MIB}, "
        f"a step {room.workspace // MIB}"
    )


def weight_bytes(model_dir: Path, stored: str, loaded: str) -> int:
    """What the weights will take in memory when they are held in another type than on disk."""
    on_disk = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    return on_disk * DTYPE_BYTES[loaded] // DTYPE_BYTES[stored]


def cpu_workspace_bytes(spec: ModelSpec, max_batch_tokens: int, max_num_seqs: int) -> int:
    """Activations of a step of `max_batch_tokens` and the logits of `max_num_seqs` rows, in float32
    and with copies that operations make: an upper bound."""
    heads = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    per_token = 6 * spec.hidden_size + 3 * spec.intermediate_size + 2 * heads
    return 4 * (max_batch_tokens * per_token + 4 * max_num_seqs * spec.vocab_size)
