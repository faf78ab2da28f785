"""Prefill attention in Triton: prompt chunks over their paged context and themselves.

Online softmax over tiles of K and V (FlashAttention-2, Dao, 2023, https://arxiv.org/abs/2307.08691,
section 3.1). A program's rows are neighbouring tokens times the query heads of one KV head, so the
group shares one read of K and V.

Steps that are masked for a row leave it unchanged to the bit, and key tiles lie on fixed positions:
a token's result does not depend on how its prompt was cut into chunks or on the batch.
"""

from __future__ import annotations

import torch

from baton.kernels.jit import check_operands, jit, on_device_of, tl
from baton.kernels.tiles import head_pad, prefill_tile

_LOG2_E = 1.4426950408889634


def attention_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """As `baton.kernels.reference.attention_prefill`, without waiting for the GPU."""
    q = check_operands(q, kv)
    tokens, heads, head_dim = q.shape
    batch = context_lens.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if tokens == 0:
        return out
    of_layer = kv[:, layer]
    kv_heads, block_size = kv.shape[3], kv.shape[4]
    group = heads // kv_heads
    tile = prefill_tile(head_dim, kv)
    rows = max(tile.rows, 1 << (group - 1).bit_length())
    tile_tokens = rows // group
    # Each sequence starts a tile of its own: `batch` more tiles than one sequence would need.
    tiles = tokens // tile_tokens + batch
    with on_device_of(kv):
        _attend_tiles[(tiles, kv_heads)](
            q,
            of_layer,
            block_tables,
            query_start,
            context_lens,
            out,
            float(scale) * _LOG2_E,
            batch,
            q.stride(0),
            q.stride(1),
            of_layer.stride(0),
            of_layer.stride(1),
            of_layer.stride(2),
            block_tables.stride(0),
            GROUP=group,
            WINDOW=window,
            HEAD_DIM=head_dim,
            HEAD_PAD=head_pad(head_dim),
            BLOCK_SIZE=block_size,
            ROWS=rows,
            TILE_TOKENS=tile_tokens,
            KEYS=tile.keys,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


@jit
def _owner(
    query_start: tl.tensor, batch: tl.tensor, tile: tl.tensor, TILE_TOKENS: tl.constexpr
) -> tl.tensor:
    """The sequence that a tile belongs to.

    Sequence `b` owns the tiles from `query_start[b] // TILE_TOKENS + b` up to where the next one's
    begin: always enough for its tokens, at most one too many, and known without the lengths of
    the others. So the owner is found by counting the sequences that begin at or before the tile.
    """
    count = tl.zeros([128], tl.int32)
    for first in range(0, batch, 128):
        sequence = first + tl.arange(0, 128)
        start = tl.load(query_start + sequence, mask=sequence < batch, other=0)
        begins = start // TILE_TOKENS + sequence
        count += ((begins <= tile) & (sequence < batch)).to(tl.int32)
    return tl.sum(count, 0) - 1


@jit(varying=("batch", "table_stride"))
def _attend_tiles(
    q: tl.tensor,
    kv: tl.tensor,
    block_tables: tl.tensor,
    query_start: tl.tensor,
    context_lens: tl.tensor,
    out: tl.tensor,
    scale_log2: tl.tensor,
    batch: tl.tensor,
    q_stride_token: tl.tensor,
    q_stride_head: tl.tensor,
    kv_stride_block: tl.tensor,
    kv_stride_kind: tl.tensor,
    kv_stride_head: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """One program: TILE_TOKENS tokens of one chunk, all query heads of one KV head."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    sequence = _owner(query_start, batch, tile, TILE_TOKENS)
    chunk = tl.load(query_start + sequence)
    tokens = tl.load(query_start + sequence + 1) - chunk
    tile_begin = (tile - chunk // TILE_TOKENS - sequence) * TILE_TOKENS
    if tile_begin >= tokens:
        return

    context = tl.load(context_lens + sequence)
    row = tl.arange(0, ROWS)
    token = tile_begin + row // GROUP
    head = kv_head * GROUP + row % GROUP
    column = tl.arange(0, HEAD_PAD)
    key = tl.arange(0, KEYS)
    in_head = column < HEAD_DIM
    in_tile = ((row < TILE_TOKENS * GROUP) & (token < tokens))[:, None] & in_head[None, :]
    source = (chunk + token).to(tl.int64)
    q_at = source[:, None] * q_stride_token + head[:, None] * q_stride_head + column[None, :]
    queries = tl.load(q + q_at, mask=in_tile, other=0.0)

    #   first                context + tile_begin            end
    #     |--- keys that all rows may see ---|--- triangle ---|
    end = context + tl.minimum(tile_begin + TILE_TOKENS, tokens)
    # Rows without a token see what the last token sees: a row that saw nothing would divide by 0.
    query = tl.minimum(context + token, end - 1)
    first = context * 0
    if WINDOW > 0:
        first = tl.maximum(context + tile_begin - WINDOW + 1, 0) // KEYS * KEYS

    table = block_tables + sequence.to(tl.int64) * table_stride
    k_base = kv + kv_head * kv_stride_head
    v_base = k_base + kv_stride_kind
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mix = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    # Block ids are loaded a step ahead by hand, as in `attention_decode`.
    block = tl.load(table + (first + key) // BLOCK_SIZE, mask=first + key < end, other=0)
    for start in range(first, end, KEYS):
        position = start + key
        live = position < end
        at = block.to(tl.int64) * kv_stride_block + (position % BLOCK_SIZE) * HEAD_DIM
        ahead = position + KEYS
        block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
        keys = tl.load(
            k_base + at[None, :] + column[:, None], mask=live[None, :] & in_head[:, None], other=0.0
        )
        values = tl.load(
            v_base + at[:, None] + column[None, :], mask=live[:, None] & in_head[None, :], other=0.0
        )
        seen = position[None, :] <= query[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > query[:, None] - WINDOW)
        scores = tl.dot(queries, keys, input_precision="ieee") * scale_log2
        scores = tl.where(seen & live[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # Until a row's window begins it has seen no key, and -inf - -inf would be NaN.
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - origin[:, None])
        keep = tl.exp2(best - origin)
        total = total * keep + tl.sum(weights, 1)
        mix = mix * keep[:, None]
        mix += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        best = higher

    heads = tl.num_programs(1).to(tl.int64) * GROUP
    out_at = (source[:, None] * heads + head[:, None]) * HEAD_DIM + column[None, :]
    tl.store(out + out_at, (mix / total[:, None]).to(out.dtype.element_ty), mask=in_tile)
