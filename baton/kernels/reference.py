"""Attention over the paged pool in plain torch: what the Triton kernels are compared with, and
what the CPU engine runs.

All functions take the pool `kv` `[num_blocks, num_layers, 2, kv_heads, block_size, head_dim]`
(contiguous; index 2: K = 0, V = 1). Query head `h` reads KV head `h // (heads / kv_heads)`.
Scores and softmax accumulate in float32 whatever the storage type is.

Every sequence is computed by itself, in shapes that depend only on its own lengths: its result is
the same bit for bit whatever else is in the batch. No product sees an element that the caller did
not name: neither other blocks nor the unused tail of a last block, even if they hold NaN.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

_QUERY_TILE = 512
"""Queries per mask: bounds the mask's memory and what is computed only to be masked."""


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
    """Causal attention of prompt chunks, each behind its own paged context.

    `q` is `[tokens, heads, head_dim]`, the chunks of all sequences one after the other; chunk `b`
    is `q[query_start[b]:query_start[b + 1]]` and its query `i` is at position
    `context_lens[b] + i`. The chunk's own K and V are in the pool already. `block_tables`
    `[batch, max_blocks]`, `query_start` `[batch + 1]` and `context_lens` `[batch]` are int32;
    entries of a table after its sequence's last block are ignored. With `window` > 0 a query
    sees itself and the `window - 1` tokens before it. Returns `[tokens, heads, head_dim]`.
    """
    starts = query_start.tolist()
    ranges = []
    for row, context in enumerate(context_lens.tolist()):
        first_key = max(0, context - window + 1) if window else 0
        ranges.append((first_key, context + starts[row + 1] - starts[row]))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for row, (keys, values) in enumerate(_gather(kv, layer, block_tables, ranges)):
        chunk = slice(starts[row], starts[row + 1])
        if chunk.start < chunk.stop:
            _attend_chunk(q[chunk], keys, values, scale, window, out[chunk])
    return out


def _attend_chunk(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """Attention of the last positions of `keys`; `q` and `out` are `[tokens, heads, head_dim]`."""
    tokens = q.shape[0]
    before = keys.shape[2] - tokens  # keys before the first query
    masked = before > 0 or 0 < window < tokens
    tile = _QUERY_TILE if masked else tokens
    queries, result = q.transpose(0, 1)[None], out.transpose(0, 1)[None]
    for begin in range(0, tokens, tile):
        end = min(begin + tile, tokens)
        first = max(0, before + begin - window + 1) if window else 0
        last = before + end
        mask = _causal_mask(before + begin, last, first, window, q.device) if masked else None
        result[:, :, begin:end] = scaled_dot_product_attention(
            queries[:, :, begin:end],
            keys[:, :, first:last],
            values[:, :, first:last],
            attn_mask=mask,
            is_causal=not masked,
            scale=scale,
            enable_gqa=True,
        )


def _causal_mask(
    begin: int, end: int, first_key: int, window: int, device: torch.device
) -> torch.Tensor:
    """Which keys `[first_key, end)` (columns) the queries `[begin, end)` (rows) see."""
    query = torch.arange(begin, end, device=device)[:, None]
    key = torch.arange(first_key, end, device=device)[None, :]
    mask = key <= query
    return mask & (key > query - window) if window else mask


def attention_decode(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """Attention of one query per sequence, the last token of its context.

    `q` is `[batch, heads, head_dim]`; `block_tables` `[batch, max_blocks]` and `seq_lens`
    `[batch]` are int32; a length includes the current token, whose K and V are in the pool
    already. Entries of a table after its sequence's last block are ignored; a sequence of
    length 0 (padding of a batch) gives zeros. Returns `[batch, heads, head_dim]`.
    """
    batch, heads, head_dim = q.shape
    kv_heads = kv.shape[3]
    ranges = [(max(0, length - window) if window else 0, length) for length in seq_lens.tolist()]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    # The heads of a group stand where SDPA has query positions: they share one read of their K, V.
    queries = q.reshape(batch, 1, kv_heads, heads // kv_heads, head_dim)
    results = out.view(queries.shape)
    for row, (keys, values) in enumerate(_gather(kv, layer, block_tables, ranges)):
        if keys.shape[2] > 0:
            results[row] = scaled_dot_product_attention(queries[row], keys, values, scale=scale)
    return out


def _gather(
    kv: torch.Tensor, layer: int, block_tables: torch.Tensor, ranges: list[tuple[int, int]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of positions `[begin, end)` of each sequence, each `[1, kv_heads, n, head_dim]`.

    One indexed copy for the whole batch, without padding, that puts the tokens of a head side by
    side, so that nothing is transposed or repeated afterwards.
    """
    _, num_layers, _, kv_heads, block_size, head_dim = kv.shape
    # Seen as rows [block_size, head_dim], a block has 2 * kv_heads of them per layer, K's first.
    row_in_layer = torch.arange(2 * kv_heads, device=kv.device)[:, None] + layer * 2 * kv_heads
    first_rows = block_tables.to(torch.int64) * (num_layers * 2 * kv_heads)
    rows = [
        (row_in_layer + first_rows[row, begin // block_size : -(-end // block_size)]).flatten()
        for row, (begin, end) in enumerate(ranges)
    ]
    if not rows:
        return []
    copied = kv.view(-1, block_size * head_dim).index_select(0, torch.cat(rows))
    parts = copied.split_with_sizes([len(of_sequence) for of_sequence in rows])
    gathered = []
    for part, (begin, end) in zip(parts, ranges, strict=True):
        first = begin // block_size * block_size
        slots = -(-(end - first) // block_size) * block_size
        both = part.view(2, 1, kv_heads, slots, head_dim)[:, :, :, begin - first : end - first]
        gathered.append((both[0], both[1]))
    return gathered


def kv_write(
    k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, layer: int, slots: torch.Tensor
) -> None:
    """Put K and V `[tokens, kv_heads, head_dim]` of new tokens into the pool.

    `slots` `[tokens]` int64: slot = block * block_size + offset; a negative slot is skipped
    (padding of a batch). Slots must not repeat.
    """
    used = slots >= 0
    if not bool(used.all()):
        k, v, slots = k[used], v[used], slots[used]
    block_size = kv.shape[4]
    block = torch.div(slots, block_size, rounding_mode="floor")
    offset = slots - block * block_size
    by_slot = kv[:, layer].transpose(2, 3)  # [num_blocks, 2, block_size, kv_heads, head_dim]
    by_slot[block, 0, offset] = k
    by_slot[block, 1, offset] = v


def block_copy(kv: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy whole blocks, all layers: `kv[dst[i]] = kv[src[i]]`.

    `src` and `dst` are `[n]` int64. No block may be in both, and none twice in `dst`.
    """
    kv.index_copy_(0, dst, kv.index_select(0, src))
