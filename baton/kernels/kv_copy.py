"""Movement of KV in Triton: new tokens into the pool, and whole blocks within it."""

from __future__ import annotations

import torch

from baton.kernels.jit import check_pool, jit, on_device_of, tl

_WRITE_CHUNK = 1024
"""Elements that one program of `kv_write` moves, of K and of V."""

_COPY_CHUNK = 8192
"""Elements that one program of `block_copy` moves."""


def kv_write(
    k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, layer: int, slots: torch.Tensor
) -> None:
    """As `baton.kernels.reference.kv_write`, without waiting for the GPU."""
    check_pool(kv)
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    if k.stride(2) != 1 or v.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    of_layer = kv[:, layer]
    elements = kv_heads * head_dim
    with on_device_of(kv):
        _write_tokens[(tokens, -(-elements // _WRITE_CHUNK))](
            k,
            v,
            of_layer,
            slots,
            elements,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            of_layer.stride(0),
            of_layer.stride(1),
            of_layer.stride(2),
            HEAD_DIM=head_dim,
            BLOCK_SIZE=kv.shape[4],
            CHUNK=_WRITE_CHUNK,
            num_warps=4,
        )


@jit
def _write_tokens(
    k: tl.tensor,
    v: tl.tensor,
    kv: tl.tensor,
    slots: tl.tensor,
    elements: tl.tensor,
    k_stride_token: tl.tensor,
    k_stride_head: tl.tensor,
    v_stride_token: tl.tensor,
    v_stride_head: tl.tensor,
    kv_stride_block: tl.tensor,
    kv_stride_kind: tl.tensor,
    kv_stride_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: up to CHUNK elements of K and of V of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    element = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    live = (element < elements) & (slot >= 0)
    head = element // HEAD_DIM
    column = element % HEAD_DIM
    new_k = tl.load(k + token * k_stride_token + head * k_stride_head + column, mask=live)
    new_v = tl.load(v + token * v_stride_token + head * v_stride_head + column, mask=live)
    in_block = head * kv_stride_head + (slot % BLOCK_SIZE) * HEAD_DIM + column
    at = (slot // BLOCK_SIZE) * kv_stride_block + in_block
    tl.store(kv + at, new_k, mask=live)
    tl.store(kv + kv_stride_kind + at, new_v, mask=live)


def block_copy(kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """As `baton.kernels.reference.block_copy`, without waiting for the GPU."""
    check_pool(kv)
    if src.numel() == 0:
        return
    elements = kv.stride(0)
    with on_device_of(kv):
        _copy_blocks[(src.numel(), -(-elements // _COPY_CHUNK))](
            kv, src, dst, elements, CHUNK=_COPY_CHUNK, num_warps=8
        )


@jit
def _copy_blocks(
    kv: tl.tensor, src: tl.tensor, dst: tl.tensor, elements: tl.tensor, CHUNK: tl.constexpr
) -> None:
    """One program: up to CHUNK elements of one block."""
    pair = tl.program_id(0)
    element = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    live = element < elements
    # Block index times block size passes 2^31 elements in pools of a few GiB: 64-bit offsets.
    source = kv + tl.load(src + pair) * elements
    target = kv + tl.load(dst + pair) * elements
    tl.store(target + element, tl.load(source + element, mask=live), mask=live)
