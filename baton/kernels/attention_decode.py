"""Decode attention in Triton: one query per sequence over its paged KV, the KV split over programs.

Flash-decoding (Dao et al., 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html): a
sequence's KV is cut into stretches, each is attended to by itself, and the partial results are
joined by their log-sum-exp. All query heads that share a KV head are rows of one tile, so K and V
are read once.

    sequences (KV heads 0, 1)   units of work             programs of a grid of 4
    a  |----|----|----|         a0.0 a0.1 a1.0 a1.1 ...    0: a0.0 b0.0
    b  |----|                   (stretch.head)             1: a0.1 b0.1
                                                           2: a1.0 ...

The grid is as many programs as run at once, whatever the batch is; each takes every n-th unit. A
program works out from the lengths which units there are, so nothing is read on the host and a CUDA
graph can be replayed for other lengths. Who finishes a sequence's last stretch joins them.

The stretches of a sequence are a function of its own length, never of the batch or of the grid: a
sequence's result is the same bit for bit in any batch.
"""

from __future__ import annotations

import torch

from baton.kernels.jit import check_operands, jit, on_device_of, tl
from baton.kernels.tiles import decode_tile, head_pad, resident_programs

_MAX_SPLITS = 32
"""Stretches per sequence: fills a GPU at batch 1, bounds the partial results."""

_MIN_SPLIT = 256
"""Tokens below which a stretch is not cut further: its partial result costs 1 to 2 % of its KV."""

_LOG2_E = 1.4426950408889634


class PagedDecode:
    """`baton.kernels.reference.attention_decode`, without waiting for the GPU.

    What is launched depends on shapes only, not on lengths, so a CUDA graph can capture it: then
    `block_tables` is as wide as the longest sequence that the graph shall serve, and a batch as
    large has been attended to before (the counters below are not to be made during a capture).
    """

    def __init__(self) -> None:
        # Outgrown ones stay: recorded CUDA graphs go on using them.
        self._arrivals: dict[torch.device, list[torch.Tensor]] = {}

    def __call__(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        layer: int,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        scale: float,
        window: int = 0,
    ) -> torch.Tensor:
        q = check_operands(q, kv)
        batch, heads, head_dim = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if batch == 0:
            return out
        of_layer = kv[:, layer]
        kv_heads, block_size = kv.shape[3], kv.shape[4]
        group = heads // kv_heads
        longest = block_tables.shape[1] * block_size
        splits = max(1, min(_MAX_SPLITS, -(-min(longest, window or longest) // _MIN_SPLIT)))
        partial = q.new_empty((batch, heads, splits, head_dim), dtype=torch.float32)
        log_sums = q.new_empty((batch, heads, splits), dtype=torch.float32)
        tile = decode_tile(head_dim, kv)
        units = batch * kv_heads * splits
        with on_device_of(kv):
            _attend[(min(units, resident_programs(tile, kv)),)](
                q,
                of_layer,
                block_tables,
                seq_lens,
                partial,
                log_sums,
                self._counters(batch * kv_heads, kv.device),
                out,
                float(scale) * _LOG2_E,
                batch,
                splits,
                q.stride(0),
                q.stride(1),
                of_layer.stride(0),
                of_layer.stride(1),
                of_layer.stride(2),
                block_tables.stride(0),
                GROUP=group,
                KV_HEADS=kv_heads,
                WINDOW=window,
                HEAD_DIM=head_dim,
                HEAD_PAD=head_pad(head_dim),
                BLOCK_SIZE=block_size,
                ROWS=max(tile.rows, 1 << (group - 1).bit_length()),
                KEYS=tile.keys,
                BATCH_PAD=_batch_pad(batch),
                MAX_SPLITS=_MAX_SPLITS,
                MIN_SPLIT=_MIN_SPLIT,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
        return out

    def _counters(self, count: int, device: torch.device) -> torch.Tensor:
        """How many stretches of each (sequence, KV head) are done: all 0 between launches."""
        made = self._arrivals.setdefault(device, [])
        if not made or len(made[-1]) < count:
            made.append(torch.zeros(max(count, 4096), dtype=torch.int32, device=device))
        return made[-1]


def _batch_pad(batch: int) -> int:
    """Few different ones, as each is compiled: 16, 64, 256, 1024, ..."""
    padded = 16
    while padded < batch:
        padded *= 4
    return padded


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


@jit(varying=("batch", "splits", "table_stride"))
def _attend(
    q: tl.tensor,
    kv: tl.tensor,
    block_tables: tl.tensor,
    seq_lens: tl.tensor,
    partial: tl.tensor,
    log_sums: tl.tensor,
    arrivals: tl.tensor,
    out: tl.tensor,
    scale_log2: tl.tensor,
    batch: tl.tensor,
    splits: tl.tensor,
    q_stride_token: tl.tensor,
    q_stride_head: tl.tensor,
    kv_stride_block: tl.tensor,
    kv_stride_kind: tl.tensor,
    kv_stride_head: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    BATCH_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
) -> None:
    """One program: every n-th unit of work, each a stretch of a sequence and a KV head."""
    member = tl.arange(0, BATCH_PAD)
    lengths = tl.load(seq_lens + member, mask=member < batch, other=0)
    seen = lengths - _first_key(lengths, WINDOW)
    # A sequence of length 0 has one stretch, which is empty and writes zeros.
    counts = tl.maximum(tl.cdiv(seen, _split_size(seen, MAX_SPLITS, MIN_SPLIT)), 1)
    counts = tl.where(member < batch, counts, 0)
    ends = tl.cumsum(counts, 0)
    units = tl.sum(counts, 0) * KV_HEADS

    row = tl.arange(0, ROWS)
    column = tl.arange(0, HEAD_PAD)
    key = tl.arange(0, KEYS)
    in_head = column < HEAD_DIM
    in_tile = (row < GROUP)[:, None] & in_head[None, :]
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        stretch = unit // KV_HEADS
        kv_head = unit % KV_HEADS
        before = (ends <= stretch) & (member < batch)
        index = tl.sum(before.to(tl.int32), 0)
        split = stretch - tl.sum(tl.where(before, counts, 0), 0)
        sequence = index.to(tl.int64)
        length = tl.load(seq_lens + sequence)
        first = _first_key(length, WINDOW)
        size = _split_size(length - first, MAX_SPLITS, MIN_SPLIT)
        begin = first + split * size
        end = tl.minimum(begin + size, length)
        count = tl.maximum(tl.cdiv(length - first, size), 1)

        head = kv_head * GROUP + row
        q_at = sequence * q_stride_token + head[:, None] * q_stride_head + column[None, :]
        queries = tl.load(q + q_at, mask=in_tile, other=0.0)
        table = block_tables + sequence * table_stride
        k_base = kv + kv_head * kv_stride_head
        v_base = k_base + kv_stride_kind
        best = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mix = tl.zeros([ROWS, HEAD_PAD], tl.float32)
        # Block ids are loaded a step ahead by hand: if the addresses of K and V hung on a load of
        # the same step, Triton's pipeline would need two stages more for as many loads under way.
        block = tl.load(table + (begin + key) // BLOCK_SIZE, mask=begin + key < end, other=0)
        for start in range(begin, end, KEYS):
            position = start + key
            live = position < end
            at = block.to(tl.int64) * kv_stride_block + (position % BLOCK_SIZE) * HEAD_DIM
            ahead = position + KEYS
            block = tl.load(table + ahead // BLOCK_SIZE, mask=ahead < end, other=0)
            keys = tl.load(
                k_base + at[None, :] + column[:, None],
                mask=live[None, :] & in_head[:, None],
                other=0.0,
            )
            values = tl.load(
                v_base + at[:, None] + column[None, :],
                mask=live[:, None] & in_head[None, :],
                other=0.0,
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

        mix = mix / tl.where(total > 0, total, 1.0)[:, None]
        heads_before = sequence * (KV_HEADS * GROUP) + kv_head * GROUP
        if count == 1:
            out_at = (heads_before + row)[:, None] * HEAD_DIM + column[None, :]
            tl.store(out + out_at, mix.to(out.dtype.element_ty), mask=in_tile)
        else:
            slot = (heads_before + row) * splits + split
            tl.store(partial + slot[:, None] * HEAD_DIM + column[None, :], mix, mask=in_tile)
            tl.store(log_sums + slot, best + tl.log2(total), mask=row < GROUP)
            # All threads have stored before one of them counts; the counter's release and acquire
            # order what other programs stored before what the last one loads.
            tl.debug_barrier()
            counter = arrivals + sequence * KV_HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
                tl.store(counter, 0)  # for the next launch
                for member_head in range(GROUP):
                    _join(
                        partial,
                        log_sums,
                        out,
                        heads_before + member_head,
                        count,
                        splits,
                        HEAD_DIM,
                        HEAD_PAD,
                        MAX_SPLITS,
                    )


@jit
def _join(
    partial: tl.tensor,
    log_sums: tl.tensor,
    out: tl.tensor,
    head: tl.tensor,
    count: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
) -> None:
    """One head of one sequence. Always joins MAX_SPLITS rows, the unused ones with weight 0, so
    that the order of additions does not depend on the width of the block tables."""
    split = tl.arange(0, MAX_SPLITS)
    column = tl.arange(0, HEAD_PAD)
    live = split < count
    in_head = column < HEAD_DIM
    slot = head * splits + split
    log_sum = tl.load(log_sums + slot, mask=live, other=float("-inf"))
    parts = tl.load(
        partial + slot[:, None] * HEAD_DIM + column[None, :],
        mask=live[:, None] & in_head[None, :],
        other=0.0,
    )
    weights = tl.exp2(log_sum - tl.max(log_sum, 0))
    result = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * HEAD_DIM + column, result.to(out.dtype.element_ty), mask=in_head)
