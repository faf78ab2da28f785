"""Single native operations on torch tensors (`baton/native/src/capi_ops.cpp`), and what they are
compared with. Every result lies between guard values that must survive."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from enum import IntEnum

import pytest
import torch

from baton.native.library import library

needs_native = pytest.mark.usefixtures("native_variant")
"""Runs a test with each library that this machine can use."""

_GUARD = 64


class Product(IntEnum):
    PLAIN = 0
    FLOAT32 = 1
    ADD = 2
    SILU = 3


class CPool(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        *((name, c_int64) for name in ("layers", "kv_heads", "block_size", "head_dim")),
    )


class CSpan(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("first_row", "queries", "start")),
        ("blocks", c_void_p),
        ("shared", c_int64),  # set by the library
    )


class CAttentionShape(ctypes.Structure):
    _fields_ = (("heads", c_int64), ("scale", c_float), ("window", c_int64))


class CRopeShape(ctypes.Structure):
    _fields_ = (
        ("heads", c_int64),
        ("qk_norm", c_void_p),
        ("eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
    )


class Guarded:
    """A tensor, and a check that its neighbourhood has not been written to."""

    def __init__(self, start: torch.Tensor) -> None:
        self._whole = torch.full((start.numel() + 2 * _GUARD,), 7.0, dtype=start.dtype)
        self._inner = self._whole[_GUARD:-_GUARD]
        self._inner.copy_(start.flatten())
        self._shape = start.shape

    @property
    def address(self) -> int:
        return self._inner.data_ptr()

    def result(self) -> torch.Tensor:
        assert bool((self._whole[:_GUARD] == 7).all())
        assert bool((self._whole[-_GUARD:] == 7).all())
        return self._inner.view(self._shape).clone()


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).bfloat16()


def product(
    kind: Product,
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """`x` `[rows, in]`, `w` `[out, in]`; `[rows, out]` (SILU: out / 2)."""
    width = len(w) // 2 if kind is Product.SILU else len(w)
    dtype = torch.float32 if kind is Product.FLOAT32 else torch.bfloat16
    empty = torch.full((len(x), width), torch.nan, dtype=dtype)
    out = Guarded(empty if residual is None else residual)
    padded = library().baton_op_product(
        threads,
        int(kind),
        address(x),
        *map(c_int64, x.shape),
        address(w),
        c_int64(len(w)),
        address(bias),
        c_void_p(out.address),
    )
    assert padded
    return out.result()


def unpacked(w: torch.Tensor) -> torch.Tensor:
    out = Guarded(torch.full_like(w, torch.nan))
    library().baton_op_unpack(address(w), *map(c_int64, w.shape), c_void_p(out.address))
    return out.result()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, threads: int = 1) -> torch.Tensor:
    out = Guarded(torch.full_like(x, torch.nan))
    shape = map(c_int64, x.shape)
    padded = library().baton_op_rms_norm(
        threads, address(x), *shape, address(weight), c_float(eps), c_void_p(out.address)
    )
    assert padded
    return out.result()


def argmax(logits: torch.Tensor, threads: int = 1) -> list[int]:
    best = Guarded(torch.zeros(len(logits), dtype=torch.int64))
    shape = map(c_int64, logits.shape)
    library().baton_op_argmax(threads, address(logits), *shape, c_void_p(best.address))
    return best.result().tolist()


def attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    spans: Sequence[tuple[int, int, torch.Tensor]],
    scale: float,
    window: int = 0,
    threads: int = 1,
) -> torch.Tensor:
    """`q` `[rows, heads, head_dim]`, the spans' rows one after the other; a span is (queries,
    position of the first, its int32 block table)."""
    first = 0
    c_spans = (CSpan * len(spans))()
    for index, (queries, start, table) in enumerate(spans):
        c_spans[index] = CSpan(first, queries, start, table.data_ptr())
        first += queries
    out = Guarded(torch.full_like(q, torch.nan))
    library().baton_op_attention(
        threads,
        ctypes.byref(c_pool(kv)),
        c_int64(layer),
        ctypes.byref(CAttentionShape(q.shape[1], scale, window)),
        c_spans,
        c_int64(len(spans)),
        address(q),
        c_int64(len(q)),
        c_void_p(out.address),
    )
    return out.result()


def rope_and_write(
    qkv: torch.Tensor,
    heads: int,
    qk_norm: torch.Tensor | None,
    table: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    threads: int = 1,
) -> torch.Tensor:
    """Writes to `kv`; returns `qkv` `[rows, width]` as it is then. `table` is `rope_table`'s."""
    out = Guarded(qkv)
    shape = CRopeShape(
        heads,
        None if qk_norm is None else qk_norm.data_ptr(),
        1e-6,
        table[0].data_ptr(),
        table[1].data_ptr(),
    )
    library().baton_op_rope_and_write(
        threads,
        c_void_p(out.address),
        *map(c_int64, qkv.shape),
        ctypes.byref(shape),
        address(positions),
        address(slots),
        ctypes.byref(c_pool(kv)),
        c_int64(layer),
    )
    return out.result()


def c_pool(kv: torch.Tensor) -> CPool:
    _, layers, _, kv_heads, block_size, head_dim = kv.shape
    return CPool(kv.data_ptr(), layers, kv_heads, block_size, head_dim)


def address(tensor: torch.Tensor | None) -> c_void_p | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())
