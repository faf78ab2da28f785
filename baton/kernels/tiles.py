"""Tile sizes of the Triton attention kernels: a small stored table instead of tuning at start.

Keys are the padded head size and the shared memory that a GPU gives one program. The queries are
held once, K and V tiles once per stage of the loads' pipeline; a test compiles every entry and
checks that it fits. Float32 products are exact (no TF32) and thus slow: their tiles are small
enough to stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int  # query rows (tokens x heads of a group) of one program; decode raises it to fit
    keys: int  # K and V tokens of one step of its loop
    num_warps: int
    num_stages: int


_SMALL, _LARGE = 99, 163
"""KiB of shared memory that one program may use; data centre GPUs have at least the large one."""

_SMALL_GPUS = {(8, 6), (8, 9), (12, 0), (12, 1)}
"""Compute capabilities of the others (CUDA C++ Programming Guide, technical specifications)."""

_PREFILL = {
    # (head_pad, KiB of shared memory), for two-byte types
    (64, _SMALL): Tile(rows=128, keys=64, num_warps=8, num_stages=3),
    (64, _LARGE): Tile(rows=128, keys=64, num_warps=8, num_stages=3),
    (128, _SMALL): Tile(rows=64, keys=32, num_warps=4, num_stages=2),
    (128, _LARGE): Tile(rows=128, keys=64, num_warps=8, num_stages=3),
    (256, _SMALL): Tile(rows=32, keys=16, num_warps=4, num_stages=2),
    (256, _LARGE): Tile(rows=64, keys=32, num_warps=8, num_stages=2),
}

_DECODE = {
    (64, _SMALL): Tile(rows=16, keys=64, num_warps=4, num_stages=3),
    (64, _LARGE): Tile(rows=16, keys=128, num_warps=4, num_stages=3),
    (128, _SMALL): Tile(rows=16, keys=32, num_warps=4, num_stages=3),
    (128, _LARGE): Tile(rows=16, keys=64, num_warps=4, num_stages=3),
    (256, _SMALL): Tile(rows=16, keys=32, num_warps=4, num_stages=2),
    (256, _LARGE): Tile(rows=16, keys=32, num_warps=4, num_stages=3),
}

_FLOAT32 = {
    # head_pad, for both kernels
    64: Tile(rows=16, keys=32, num_warps=4, num_stages=2),
    128: Tile(rows=16, keys=16, num_warps=4, num_stages=2),
    256: Tile(rows=16, keys=16, num_warps=8, num_stages=2),
}


def head_pad(head_dim: int) -> int:
    """The power of two that a head is padded to in registers; loads and stores are masked."""
    return max(16, 1 << (head_dim - 1).bit_length())


def prefill_tile(head_dim: int, kv: torch.Tensor) -> Tile:
    """The tile of `attention_prefill` for a pool. Raises ConfigError for heads above 256."""
    return _look_up(_PREFILL, head_dim, kv)


def decode_tile(head_dim: int, kv: torch.Tensor) -> Tile:
    """The tile of `attention_decode` for a pool. Raises ConfigError for heads above 256."""
    return _look_up(_DECODE, head_dim, kv)


def _look_up(table: dict[tuple[int, int], Tile], head_dim: int, kv: torch.Tensor) -> Tile:
    pad = max(64, head_pad(head_dim))
    if pad > 256:
        raise ConfigError(
            f"the Triton kernels take heads of up to 256 elements, and this model's have "
            f"{head_dim}; choose the kernels 'reference'"
        )
    if kv.element_size() == 4:
        return _FLOAT32[pad]
    return table[pad, _shared_memory(kv.device)]


@lru_cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return _LARGE
    return _SMALL if torch.cuda.get_device_capability(device) in _SMALL_GPUS else _LARGE
