"""Which tile the Triton attention kernels use: a look-up in a stored table, no search at start.

The table's keys are the architecture (80: Ampere, 89: Ada and its like with less shared memory, 90:
Hopper, 100: Blackwell) and the padded head size. The queries are held once, K and V tiles once per
stage of the loads' pipeline; a test compiles every entry and checks that it fits. Float32 products
are exact (no TF32) and thus slow: their tiles are small enough to stay in registers.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from baton.errors import ConfigError
from baton.kernels.tile_table import DECODE, PREFILL, Tile

__all__ = ["FLOAT32", "Tile", "architecture", "decode_tile", "head_pad", "prefill_tile"]

FLOAT32 = {
    # head_pad, for both kernels
    64: Tile(rows=16, keys=32, num_warps=4, num_stages=2, programs=2),
    128: Tile(rows=16, keys=16, num_warps=4, num_stages=2, programs=2),
    256: Tile(rows=16, keys=16, num_warps=8, num_stages=2),
}

_SMALL_GPUS = {(8, 6), (8, 9), (12, 0), (12, 1)}
"""Compute capabilities whose programs may use 99 KiB of shared memory; 163 KiB on (8, 0), (8, 7),
227 KiB on newer data centre GPUs (CUDA C++ Programming Guide, technical specifications)."""

_INTERPRETED = 90
"""The architecture whose tiles the interpreter takes."""

_INTERPRETED_PROGRAMS = 3
"""Of the interpreter's grid for decode: fewer than there are units of work, as on a busy GPU."""


def architecture(capability: tuple[int, int]) -> int:
    """The table's key for a compute capability of at least (8, 0)."""
    if capability in _SMALL_GPUS:
        return 89
    return max(arch for arch in (80, 90, 100) if arch <= 10 * capability[0])


def head_pad(head_dim: int) -> int:
    """The power of two that a head is padded to in registers; loads and stores are masked."""
    return max(16, 1 << (head_dim - 1).bit_length())


def prefill_tile(head_dim: int, kv: torch.Tensor) -> Tile:
    """The tile of `attention_prefill` for a pool. Raises ConfigError for heads above 256."""
    return _look_up(PREFILL, head_dim, kv)


def decode_tile(head_dim: int, kv: torch.Tensor) -> Tile:
    """The tile of `attention_decode` for a pool. Raises ConfigError for heads above 256."""
    return _look_up(DECODE, head_dim, kv)


def resident_programs(tile: Tile, kv: torch.Tensor) -> int:
    """How many programs of the decode kernel run at once on the pool's device."""
    if kv.device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return tile.programs * _multiprocessors(kv.device)


def _look_up(table: dict[tuple[int, int], Tile], head_dim: int, kv: torch.Tensor) -> Tile:
    pad = max(64, head_pad(head_dim))
    if pad > 256:
        raise ConfigError(
            f"the Triton kernels take heads of up to 256 elements, and this model's have "
            f"{head_dim}; choose the kernels 'reference'"
        )
    if kv.element_size() == 4:
        return FLOAT32[pad]
    return table[_architecture(kv.device), pad]


@lru_cache
def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED
    return architecture(torch.cuda.get_device_capability(device))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
