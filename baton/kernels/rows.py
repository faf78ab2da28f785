"""What a decoder does to every row by itself, in Triton: each is one pass over memory.

The functions are those of `baton.kernels.reference_rows`, without waiting for the GPU; what is
launched depends on shapes only, so CUDA graphs can capture all of them. Arithmetic is in float32,
rounded once at the end.
"""

from __future__ import annotations

import torch

from baton.errors import ConfigError, InternalError
from baton.kernels.jit import check_pool, jit, on_device_of, tl

_LARGEST_ROW = 32768
"""Elements of a row that one program holds in registers: 32 warps times 32."""

_HEADS = 8
"""Heads of one token in one program of `norm_rope_write`."""

_CHUNK = 1024
"""Elements that one program of `silu_mul` makes."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch_norm(x, None, weight, eps, out)
    return out


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites `hidden` with the sum."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _launch_norm(hidden, delta, weight, eps, out)
    return hidden, out


def _launch_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
) -> None:
    rows, size = x.shape
    padded = max(128, 1 << (size - 1).bit_length())
    if padded > _LARGEST_ROW:
        raise ConfigError(f"the Triton kernels take rows of up to {_LARGEST_ROW}, not {size}")
    if x.stride(1) != 1 or (delta is not None and (delta.stride(1) != 1 or delta.shape != x.shape)):
        raise InternalError(f"rows {tuple(x.shape)} cannot be added and normed as they lie")
    if rows == 0:
        return
    with on_device_of(x):
        _norm_rows[(rows,)](
            x,
            x if delta is None else delta,
            weight,
            out,
            eps,
            x.stride(0),
            0 if delta is None else delta.stride(0),
            SIZE=size,
            PADDED=padded,
            ADD=delta is not None,
            num_warps=min(16, max(1, padded // 512)),
        )


@jit
def _norm_rows(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    x_stride: tl.tensor,
    delta_stride: tl.tensor,
    SIZE: tl.constexpr,
    PADDED: tl.constexpr,
    ADD: tl.constexpr,
) -> None:
    """One program: one row. With ADD, `x` becomes the sum, which is what is normed."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    live = column < SIZE
    values = tl.load(x + row * x_stride + column, mask=live, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(delta + row * delta_stride + column, mask=live, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(x + row * x_stride + column, rounded, mask=live)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    gain = tl.load(weight + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, (values * scale * gain).to(out.dtype.element_ty), mask=live)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    rows, both = gate_up.shape
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty((rows, both // 2))
    if rows:
        with on_device_of(gate_up):
            _silu_mul[(rows, -(-both // 2 // _CHUNK))](
                gate_up, out, SIZE=both // 2, CHUNK=_CHUNK, num_warps=4
            )
    return out


@jit
def _silu_mul(gate_up: tl.tensor, out: tl.tensor, SIZE: tl.constexpr, CHUNK: tl.constexpr) -> None:
    """One program: up to CHUNK elements of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    live = column < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + column, mask=live, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * SIZE + column, result.to(out.dtype.element_ty), mask=live)


def norm_rope_write(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotation: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
) -> torch.Tensor:
    check_pool(kv)
    tokens, rows, head_dim = qkv.shape
    kv_heads = kv.shape[3]
    heads = rows - 2 * kv_heads
    if qkv.dtype != kv.dtype or head_dim != kv.shape[5] or heads < 1 or qkv.stride(2) != 1:
        raise InternalError(f"projected rows {tuple(qkv.shape)} do not fit the KV pool")
    if rotation.shape != (2, tokens, 1, head_dim // 2) or not rotation.is_contiguous():
        raise InternalError(f"rotation {tuple(rotation.shape)} is not of {tokens} tokens")
    queries = qkv.new_empty((tokens, heads, head_dim))
    of_layer = kv[:, layer]
    if tokens:
        with on_device_of(kv):
            _norm_rope_write[(tokens, -(-rows // _HEADS))](
                qkv,
                qkv if qk_norm is None else qk_norm,
                rotation,
                queries,
                of_layer,
                slots,
                eps,
                tokens,
                qkv.stride(0),
                qkv.stride(1),
                of_layer.stride(0),
                of_layer.stride(1),
                of_layer.stride(2),
                NORM=qk_norm is not None,
                HEADS=heads,
                KV_HEADS=kv_heads,
                HALF=head_dim // 2,
                HALF_PAD=max(16, 1 << (head_dim // 2 - 1).bit_length()),
                BLOCK_SIZE=kv.shape[4],
                ROWS=_HEADS,
                num_warps=4,
            )
    return queries


@jit(varying=("tokens",))
def _norm_rope_write(
    qkv: tl.tensor,
    qk_norm: tl.tensor,
    rotation: tl.tensor,
    queries: tl.tensor,
    kv: tl.tensor,
    slots: tl.tensor,
    eps: tl.tensor,
    tokens: tl.tensor,
    qkv_stride_token: tl.tensor,
    qkv_stride_head: tl.tensor,
    kv_stride_block: tl.tensor,
    kv_stride_kind: tl.tensor,
    kv_stride_head: tl.tensor,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program: ROWS heads (queries, then keys, then values) of one token, in two halves."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, HALF_PAD)
    in_half = pair < HALF
    live = (head < HEADS + 2 * KV_HEADS)[:, None] & in_half[None, :]
    at = token * qkv_stride_token + head[:, None] * qkv_stride_head + pair[None, :]
    left = tl.load(qkv + at, mask=live, other=0.0).to(tl.float32)
    right = tl.load(qkv + at + HALF, mask=live, other=0.0).to(tl.float32)

    is_value = (head >= HEADS + KV_HEADS)[:, None]
    cos = tl.load(rotation + token * HALF + pair, mask=in_half, other=0.0)[None, :]
    sin = tl.load(rotation + (tokens + token) * HALF + pair, mask=in_half, other=0.0)[None, :]
    a, b = left, right
    if NORM:
        squares = tl.sum(left * left + right * right, 1) / (2 * HALF)
        scale = tl.rsqrt(squares + eps)[:, None]
        normed = live & (head < HEADS + KV_HEADS)[:, None]
        gain_at = head[:, None] * 2 * HALF + pair[None, :]
        a = a * scale * tl.load(qk_norm + gain_at, mask=normed, other=0.0).to(tl.float32)
        b = b * scale * tl.load(qk_norm + gain_at + HALF, mask=normed, other=0.0).to(tl.float32)
    left = tl.where(is_value, left, a * cos - b * sin).to(kv.dtype.element_ty)
    right = tl.where(is_value, right, b * cos + a * sin).to(kv.dtype.element_ty)

    is_query = live & (head < HEADS)[:, None]
    query_at = (token * HEADS + head[:, None]) * 2 * HALF + pair[None, :]
    tl.store(queries + query_at, left, mask=is_query)
    tl.store(queries + query_at + HALF, right, mask=is_query)

    slot = tl.load(slots + token)
    kept = live & (head >= HEADS)[:, None] & (slot >= 0)
    kind = is_value.to(tl.int64) * kv_stride_kind
    kv_head = (head - HEADS).to(tl.int64)[:, None] - is_value.to(tl.int64) * KV_HEADS
    in_block = kind + kv_head * kv_stride_head + (slot % BLOCK_SIZE) * 2 * HALF
    pool_at = (slot // BLOCK_SIZE) * kv_stride_block + in_block + pair[None, :]
    tl.store(kv + pool_at, left, mask=kept)
    tl.store(kv + pool_at + HALF, right, mask=kept)
