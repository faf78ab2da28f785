"""Decode attention in Triton: one query per sequence over its paged KV, the KV split over programs.

Flash-decoding (Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): the
programs of a sequence each attend to one stretch of its tokens, and a second kernel joins their
partial results by their log-sum-exp. All query heads that share a KV head are rows of one program,
so K and V are read once.

The stretches of a sequence are a function of its own length, never of the batch or of how busy the
GPU is: a sequence's result is the same bit for bit in any batch.
"""

from __future__ import annotations

import torch

from baton.kernels.jit import check_operands, jit, on_device_of, tl
from baton.kernels.tiles import decode_tile, head_pad

_MAX_SPLITS = 32
"""Programs per sequence and KV head: fills a GPU at batch 1, bounds the partial results."""

_MIN_SPLIT = 256
"""Tokens below which a stretch is not cut further: its partial result costs 1 to 2 % of its KV."""

_LOG2_E = 1.4426950408889634


def attention_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """As `baton.kernels.reference.attention_decode`, without waiting for the GPU.

    What is launched depends on shapes only, not on lengths, so a CUDA graph can capture it: then
    `block_tables` is as wide as the longest sequence that the graph shall serve.
    """
    q = check_operands(q, kv)
    batch, heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if batch == 0:
        return out
    of_layer = kv[:, layer]
    kv_heads, block_size = kv.shape[3], kv.shape[4]
    group = heads // kv_heads
    longest = block_tables.shape[1] * block_size
    splits = min(_MAX_SPLITS, -(-min(longest, window or longest) // _MIN_SPLIT))
    partial = q.new_empty((batch, heads, splits, head_dim), dtype=torch.float32)
    log_sums = q.new_empty((batch, heads, splits), dtype=torch.float32)
    tile = decode_tile(head_dim, kv)
    with on_device_of(kv):
        _attend_splits[(batch, kv_heads, splits)](
            q,
            of_layer,
            block_tables,
            seq_lens,
            partial,
            log_sums,
            float(scale) * _LOG2_E,
            q.stride(0),
            q.stride(1),
            of_layer.stride(0),
            of_layer.stride(1),
            of_layer.stride(2),
            block_tables.stride(0),
            splits,
            GROUP=group,
            WINDOW=window,
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad(head_dim),
            BLOCK_SIZE=block_size,
            ROWS=max(tile.rows, 1 << (group - 1).bit_length()),
            KEYS=tile.keys,
            MAX_SPLITS=_MAX_SPLITS,
            MIN_SPLIT=_MIN_SPLIT,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        _join_splits[(batch, heads)](
            partial,
            log_sums,
            seq_lens,
            out,
            splits,
            WINDOW=window,
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad(head_dim),
            MAX_SPLITS=_MAX_SPLITS,
            MIN_SPLIT=_MIN_SPLIT,
            num_warps=4,
        )
    return out


@jit
def _first_key(length: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """The first position that a query at `length - 1` sees."""
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    return first


@jit
def _split_size(visible: tl.tensor, MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr) -> tl.tensor:
    """Tokens of one stretch when `visible` tokens are cut into at most MAX_SPLITS."""
    return tl.maximum(tl.cdiv(visible, MAX_SPLITS * MIN_SPLIT), 1) * MIN_SPLIT


@jit
def _attend_splits(
    q: tl.tensor,
    kv: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    partial: tl.tensor,
    log_sums: tl.tensor,
    scale_log2: tl.tensor,
    q_stride_token: tl.tensor,
    q_stride_head: tl.tensor,
    kv_stride_block: tl.tensor,
    kv_stride_kind: tl.tensor,
    kv_stride_head: tl.tensor,
    table_stride: tl.tensor,
    splits: tl.tensor,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
) -> None:
    """One program: the query heads of one KV head of one sequence, over one stretch of its KV.

    Writes the normalized result of the stretch and its log2-sum-exp2. Softmax works in base 2.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    first = _first_key(length, WINDOW)
    size = _split_size(length - first, MAX_SPLITS, MIN_SPLIT)
    begin = first + split * size
    end = tl.minimum(begin + size, length)
    if begin >= end:
        return

    row = tl.arange(0, ROWS)
    head = kv_head * GROUP + row
    column = tl.arange(0, HEAD_PAD)
    key = tl.arange(0, KEYS)
    in_head = column < HEAD_DIM
    in_tile = (row < GROUP)[:, None] & in_head[None, :]
    q_at = sequence * q_stride_token + head[:, None] * q_stride_head + column[None, :]
    queries = tl.load(q + q_at, mask=in_tile, other=0.0)

    table = block_tables + sequence * table_stride
    k_base = kv + kv_head * kv_stride_head
    v_base = k_base + kv_stride_kind
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for start in range(begin, end, KEYS):
        position = start + key
        live = position < end
        block = tl.load(table + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
        at = block * kv_stride_block + (position % BLOCK_SIZE) * HEAD_DIM
        keys = tl.load(
            k_base + at[None, :] + column[:, None], mask=live[None, :] & in_head[:, None], other=0.0
        )
        values = tl.load(
            v_base + at[:, None] + column[None, :], mask=live[:, None] & in_head[None, :], other=0.0
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2
        scores = tl.where(live[None, :], scores, float("-inf"))
        # Every step has a live key, so `higher` is finite.
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        keep = tl.exp2(best - higher)
        total = total * keep + tl.sum(weights, 1)
        mix = mix * keep[:, None]
        mix += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        best = higher

    heads = tl.num_programs(1).to(tl.int64) * GROUP
    slot = (sequence * heads + head) * splits + split
    tl.store(
        partial + slot[:, None] * HEAD_DIM + column[None, :], mix / total[:, None], mask=in_tile
    )
    tl.store(log_sums + slot, best + tl.log2(total), mask=row < GROUP)


@jit
def _join_splits(
    partial: tl.tensor,
    log_sums: tl.tensor,
    seq_lens: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
) -> None:
    """One program: one head of one sequence. Always joins MAX_SPLITS rows, the unused ones with
    weight 0, so that the order of additions does not depend on the width of the block tables."""
    sequence = tl.program_id(0).to(tl.int64)
    pair = sequence * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(seq_lens + sequence)
    visible = length - _first_key(length, WINDOW)
    used = tl.cdiv(visible, _split_size(visible, MAX_SPLITS, MIN_SPLIT))

    split = tl.arange(0, MAX_SPLITS)
    column = tl.arange(0, HEAD_PAD)
    live = split < used
    in_head = column < HEAD_DIM
    log_sum = tl.load(log_sums + pair * splits + split, mask=live, other=float("-inf"))
    parts = tl.load(
        partial + (pair * splits + split)[:, None] * HEAD_DIM + column[None, :],
        mask=live[:, None] & in_head[None, :],
        other=0.0,
    )
    # A sequence of length 0 has no part at all: its result is 0, not the NaN of -inf - -inf.
    highest = tl.where(used > 0, tl.max(log_sum, 0), 0.0)
    weights = tl.exp2(log_sum - highest)
    total = tl.where(used > 0, tl.sum(weights, 0), 1.0)
    result = tl.sum(parts * weights[:, None], 0) / total
    tl.store(out + pair * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=in_head)
