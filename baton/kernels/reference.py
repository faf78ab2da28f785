"""Attention over the paged pool in plain torch: what the Triton kernels are compared with, and
what the CPU engine runs.

All functions take the pool `kv` `[num_blocks, num_layers, 2, kv_heads, block_size, head_dim]`
(contiguous; index 2: K = 0, V = 1). Query head `h` reads KV head `h // (heads / kv_heads)`.
Softmax accumulates in float32 whatever the storage type is.

No product ever sees an element that the caller did not name: neither other blocks nor the unused
tail of a sequence's last block can reach a result, even if they hold NaN. The shapes that
a sequence is computed with depend on its own length only, so what else is in the batch changes its
result by no more than the rounding of the matrix library.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from baton.errors import InternalError

_QUERY_TILE = 512
"""Queries per mask: bounds the mask's memory, and a tile computes no keys after its last query."""


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
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = query_start.tolist()
    for row, context in enumerate(context_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        for first in range(begin, end, _QUERY_TILE):
            last = min(first + _QUERY_TILE, end)
            position = context + first - begin
            _attend_tile(
                q[first:last],
                kv,
                layer,
                block_tables[row],
                position,
                scale,
                window,
                out[first:last],
            )
    return out


def _attend_tile(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    table: torch.Tensor,
    position: int,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """Attention of the queries `[position, position + len(q))` of one sequence, into `out`."""
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = kv.shape[3], kv.shape[4]
    end = position + tokens
    first_key = max(0, position - window + 1) if window else 0
    first_block = first_key // block_size
    keys, values = _gather(kv, layer, table[None, first_block : -(-end // block_size)])
    visible = slice(first_key - first_block * block_size, end - first_block * block_size)
    # The group is the batch dimension: K and V are expanded over it with stride 0, not repeated.
    group = heads // kv_heads
    queries = q.reshape(tokens, kv_heads, group, head_dim).permute(2, 1, 0, 3)
    plain = position == 0 and (window == 0 or window >= tokens)
    result = scaled_dot_product_attention(
        queries,
        keys[:, :, visible].expand(group, -1, -1, -1),
        values[:, :, visible].expand(group, -1, -1, -1),
        attn_mask=None if plain else _causal_mask(position, end, first_key, window, q.device),
        is_causal=plain,
        scale=scale,
    )
    out.view(tokens, kv_heads, group, head_dim).copy_(result.permute(2, 1, 0, 3))


def _causal_mask(
    position: int, end: int, first_key: int, window: int, device: torch.device
) -> torch.Tensor:
    """True where the query of a row (from `position`) sees the key of a column (from `first_key`)."""
    query = torch.arange(position, end, device=device)[:, None]
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
    `[batch]` are int32, the length includes the current token, whose K and V are in the pool
    already. Entries of a table after its sequence's last block are ignored; a sequence of
    length 0 (padding of a batch) gives zeros. Returns `[batch, heads, head_dim]`.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lengths = seq_lens.tolist()
    for padded, rows in _length_groups(lengths, kv.shape[4], window):
        if len(rows) == len(lengths):
            out.copy_(_attend_group(q, kv, layer, block_tables, lengths, padded, scale, window))
            continue
        index = torch.tensor(rows, device=q.device)
        chosen = [lengths[row] for row in rows]
        out[index] = _attend_group(
            q[index], kv, layer, block_tables[index], chosen, padded, scale, window
        )
    return out


def _length_groups(
    lengths: list[int], block_size: int, window: int
) -> Iterator[tuple[int, list[int]]]:
    """Rows that are computed together, with the number of blocks that each is padded to.

    The padded size is a function of a sequence's own length: four sizes per power of two, so at
    most a quarter of the work is padding and one long sequence does not pad the others.
    """
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length == 0:
            continue
        first_key = max(0, length - window) if window else 0
        blocks = -(-length // block_size) - first_key // block_size
        step = max(1, 1 << (blocks - 1).bit_length() >> 3)
        groups.setdefault(-(-blocks // step) * step, []).append(row)
    yield from groups.items()


def _attend_group(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    lengths: list[int],
    padded: int,
    scale: float,
    window: int,
) -> torch.Tensor:
    """`attention_decode` of sequences that all fit `padded` blocks from their first visible key."""
    batch, heads, head_dim = q.shape
    kv_heads, block_size = kv.shape[3], kv.shape[4]
    end = torch.tensor(lengths, device=q.device)[:, None]
    first_key = (end - window).clamp_(min=0) if window else torch.zeros_like(end)
    first_block = first_key // block_size
    column = first_block + torch.arange(padded, device=q.device)
    # Columns behind the last block read the sequence's own first block; the mask hides them.
    column = torch.where(column * block_size < end, column, first_block)
    keys, values = _gather(kv, layer, block_tables.gather(1, column))
    position = first_block * block_size + torch.arange(padded * block_size, device=q.device)
    visible = (position >= first_key) & (position < end)
    # Hidden slots may hold anything, and 0 * NaN is NaN.
    hidden_row, hidden_slot = (~visible).nonzero(as_tuple=True)
    keys[hidden_row, :, hidden_slot] = 0
    values[hidden_row, :, hidden_slot] = 0
    # The heads of a group are the query positions of their KV head: one product for the group.
    result = scaled_dot_product_attention(
        q.reshape(batch, kv_heads, heads // kv_heads, head_dim),
        keys,
        values,
        attn_mask=visible[:, None, None, :],
        scale=scale,
    )
    return result.reshape(batch, heads, head_dim)


def _gather(
    kv: torch.Tensor, layer: int, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of `blocks` `[batch, n]`, each `[batch, kv_heads, n * block_size, head_dim]`.

    One indexed copy that puts a head's tokens side by side; nothing is transposed afterwards.
    """
    _, num_layers, _, kv_heads, block_size, head_dim = kv.shape
    batch, count = blocks.shape
    head = torch.arange(kv_heads, device=kv.device)
    which = torch.arange(2, device=kv.device)
    first_row = (blocks.to(torch.int64) * num_layers + layer) * (2 * kv_heads)
    rows = (which[:, None] * kv_heads + head)[:, None, :, None] + first_row[None, :, None, :]
    flat = kv.view(-1, block_size * head_dim).index_select(0, rows.flatten())
    keys, values = flat.view(2, batch, kv_heads, count * block_size, head_dim).unbind(0)
    return keys, values


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
    if src.shape != dst.shape:
        raise InternalError(f"block_copy got {src.numel()} sources for {dst.numel()} destinations")
    kv.index_copy_(0, dst, kv.index_select(0, src))
