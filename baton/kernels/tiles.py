"""Tile sizes of the Triton attention kernels: a small stored table instead of tuning at start.

Keys are the padded head size, the width of an element and the shared memory that a GPU gives one
program. A tile of K and one of V are held once per stage, the queries once:
`(2 * keys * stages + rows) * head_pad * itemsize` bytes, and every entry stays below the limit of
its row with room for what the compiler adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


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
    # (head_pad, itemsize, KiB of shared memory)
    (64, 2, _SMALL): Tile(rows=128, keys=64, num_warps=4, num_stages=2),
    (64, 2, _LARGE): Tile(rows=128, keys=64, num_warps=4, num_stages=3),
    (128, 2, _SMALL): Tile(rows=64, keys=32, num_warps=4, num_stages=2),
    (128, 2, _LARGE): Tile(rows=128, keys=64, num_warps=8, num_stages=2),
    (256, 2, _SMALL): Tile(rows=32, keys=16, num_warps=4, num_stages=2),
    (256, 2, _LARGE): Tile(rows=64, keys=32, num_warps=8, num_stages=2),
    (64, 4, _SMALL): Tile(rows=32, keys=32, num_warps=4, num_stages=2),
    (64, 4, _LARGE): Tile(rows=32, keys=32, num_warps=4, num_stages=2),
    (128, 4, _SMALL): Tile(rows=16, keys=16, num_warps=4, num_stages=2),
    (128, 4, _LARGE): Tile(rows=32, keys=32, num_warps=8, num_stages=2),
    (256, 4, _SMALL): Tile(rows=16, keys=16, num_warps=8, num_stages=1),
    (256, 4, _LARGE): Tile(rows=16, keys=16, num_warps=8, num_stages=2),
}

_DECODE = {
    (64, 2, _SMALL): Tile(rows=16, keys=64, num_warps=4, num_stages=3),
    (64, 2, _LARGE): Tile(rows=16, keys=128, num_warps=4, num_stages=3),
    (128, 2, _SMALL): Tile(rows=16, keys=32, num_warps=4, num_stages=3),
    (128, 2, _LARGE): Tile(rows=16, keys=64, num_warps=4, num_stages=3),
    (256, 2, _SMALL): Tile(rows=16, keys=32, num_warps=4, num_stages=2),
    (256, 2, _LARGE): Tile(rows=16, keys=32, num_warps=4, num_stages=3),
    (64, 4, _SMALL): Tile(rows=16, keys=32, num_warps=4, num_stages=2),
    (64, 4, _LARGE): Tile(rows=16, keys=64, num_warps=4, num_stages=2),
    (128, 4, _SMALL): Tile(rows=16, keys=16, num_warps=4, num_stages=2),
    (128, 4, _LARGE): Tile(rows=16, keys=32, num_warps=4, num_stages=2),
    (256, 4, _SMALL): Tile(rows=16, keys=16, num_warps=8, num_stages=1),
    (256, 4, _LARGE): Tile(rows=16, keys=16, num_warps=8, num_stages=2),
}


def head_pad(head_dim: int) -> int:
    """The power of two that a head is padded to in registers; loads and stores are masked."""
    return max(16, 1 << (head_dim - 1).bit_length())


def prefill_tile(head_dim: int, kv: torch.Tensor) -> Tile:
    """The tile of `attention_prefill` for a pool."""
    return _PREFILL[_key(head_dim, kv)]


def decode_tile(head_dim: int, kv: torch.Tensor) -> Tile:
    """The tile of `attention_decode` for a pool."""
    return _DECODE[_key(head_dim, kv)]


def _key(head_dim: int, kv: torch.Tensor) -> tuple[int, int, int]:
    return max(64, head_pad(head_dim)), kv.element_size(), _shared_memory(kv.device)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return _LARGE
    return _SMALL if torch.cuda.get_device_capability(device) in _SMALL_GPUS else _LARGE
