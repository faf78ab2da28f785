"""Decode steps as recordings: one per bucket of batch sizes, replayed over buffers in place.

    one copy from the host, per step                      on the device, from step to step
    [ tokens | where | positions | slots | ... ]  ------> [ sampled | tokens | where | ... ]
                                                             ^
       where: for every row its token's index among sampled and tokens, so that a row may take
       what the step before sampled without the host having seen it

A step of n rows runs in the smallest bucket that holds them. The rows after n are padding: length
0, and a slot that nothing is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from baton.engine.batch import BatchItem
from baton.engine.flat import Array
from baton.engine.graph_backend import GraphBackend
from baton.engine.sampler import noise_of
from baton.engine.staging import Uploads, padded_bytes, views
from baton.kernels.dispatch import Kernels
from baton.model.decoder import Decoder, DecoderInput

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Batch sizes that are recorded. Padding costs little where a step is bound by reading weights."""

MAX_SAMPLED = 4096
"""Rows that one step may sample, recorded or not."""


@dataclass(frozen=True, slots=True)
class _Fields:
    """What a recording reads, one value per row."""

    tokens: torch.Tensor  # int64
    where: torch.Tensor  # int64, into sampled and tokens as one
    positions: torch.Tensor  # int64
    slots: torch.Tensor  # int64
    starts: torch.Tensor  # int64: of the noise
    temperatures: torch.Tensor  # float32
    lengths: torch.Tensor  # int32


def _host_fields(rows: int) -> list[Array]:
    """As for a step of padding only."""
    where = np.full(rows, 2 * MAX_SAMPLED, dtype=np.int64)
    slots = np.full(rows, -1, dtype=np.int64)
    tokens, positions, starts = (np.zeros(rows, dtype=np.int64) for _ in range(3))
    temperatures, lengths = np.zeros(rows, dtype=np.float32), np.zeros(rows, dtype=np.int32)
    return [tokens, where, positions, slots, starts, temperatures, lengths]


class DecodeGraphs:
    """The recordings of one decoder over one pool, and the buffers that they work on.

    `sampled` `[2 * MAX_SAMPLED]` int64 is where every step leaves its tokens, those that are not
    run here included: n tokens, then n times whether the row's logits were finite.
    """

    def __init__(
        self,
        decoder: Decoder,
        kernels: Kernels,
        kv: torch.Tensor,
        backend: GraphBackend,
        uploads: Uploads,
        max_model_len: int,
        vocab_size: int,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        self._decoder = decoder
        self._kernels = kernels
        self._kv = kv
        self._backend = backend
        self._uploads = uploads
        self._buckets = sorted(buckets)
        self._block_size = kv.shape[4]
        rows, device = self._buckets[-1], backend.device
        self._width = -(-max_model_len // self._block_size)
        empty = _host_fields(rows)
        # The tables that change come behind the fields, with the numbers of their rows.
        fixed = sum(padded_bytes(array.nbytes) for array in empty)
        changes = padded_bytes(8 * rows) + padded_bytes(4 * rows * self._width)
        sampled_bytes = 2 * MAX_SAMPLED * 8
        memory = torch.zeros(sampled_bytes + fixed + changes, dtype=torch.uint8, device=device)
        self._input = memory[sampled_bytes:]
        self._fields = _Fields(*views(self._input, empty))
        self._ids = memory[: sampled_bytes + 8 * rows].view(torch.int64)
        self.sampled = self._ids[: 2 * MAX_SAMPLED]
        self._tables = torch.zeros((rows, self._width), dtype=torch.int32, device=device)
        self._known: list[tuple[int, ...]] = [()] * rows  # what `_tables` holds, by row
        self._logits = torch.empty((rows, vocab_size), dtype=kv.dtype, device=device)
        self._recorded: dict[int, Callable[[], None]] = {}

    def record(self) -> None:
        """Record all buckets, the largest first: the others then fit into its memory. To be called
        in the backend's queue; takes about a second per bucket on a GPU."""
        self._uploads.send(_host_fields(self._buckets[-1]), self._input)
        for bucket in reversed(self._buckets):
            self._recorded[bucket] = self._backend.record(self._step_of(bucket))

    def fits(self, items: Sequence[BatchItem]) -> bool:
        """Whether a step of these items can be replayed."""
        return len(items) <= self._buckets[-1] and all(item.length == 1 for item in items)

    def run(self, items: Sequence[BatchItem], sources: Mapping[int, int]) -> torch.Tensor:
        """Queue a step. Row i of the result and of `sampled` is item i; an item that follows takes
        its token from row `sources[item.sequence]` of `sampled`.

        Returns logits `[items, vocab]`, valid until the next step is queued.
        """
        fields = self._host_rows(items, sources)
        changed = [row for row, item in enumerate(items) if self._known[row] is not item.blocks]
        if changed:
            tables = self._host_tables(items, changed)
            sent = self._uploads.send([*fields, np.array(changed), tables], self._input)
            self._tables[:, : tables.shape[1]].index_copy_(0, sent[-2], sent[-1])
        else:
            self._uploads.send(fields, self._input)
        self._recorded[self._bucket(len(items))]()
        return self._logits[: len(items)]

    def result(self, count: int) -> torch.Tensor:
        """Where a replayed step of `count` items leaves tokens, and whether their logits were
        finite: `[2, bucket]`, of which the first `count` columns mean something."""
        bucket = self._bucket(count)
        return self.sampled[: 2 * bucket].view(2, bucket)

    def _bucket(self, count: int) -> int:
        return next(size for size in self._buckets if size >= count)

    def _host_rows(self, items: Sequence[BatchItem], sources: Mapping[int, int]) -> list[Array]:
        fields = _host_fields(self._buckets[-1])
        tokens, where, positions, slots, starts, temperatures, lengths = fields
        size, count = self._block_size, len(items)
        tokens[:count] = [0 if item.follows else item.tokens[0] for item in items]
        where[:count] = [
            sources[item.sequence] if item.follows else 2 * MAX_SAMPLED + row
            for row, item in enumerate(items)
        ]
        positions[:count] = [item.start for item in items]
        slots[:count] = [
            item.blocks[item.start // size] * size + item.start % size for item in items
        ]
        starts[:count], temperatures[:count] = zip(
            *(noise_of(item.sample) for item in items), strict=True
        )
        lengths[:count] = positions[:count] + 1
        return fields

    def _host_tables(self, items: Sequence[BatchItem], changed: Sequence[int]) -> Array:
        """The tables of rows whose sequence is another one, or has got a block."""
        longest = max(len(items[row].blocks) for row in changed)
        tables = np.zeros((len(changed), min(self._width, longest)), dtype=np.int32)
        for number, row in enumerate(changed):
            blocks = self._known[row] = items[row].blocks
            tables[number, : len(blocks)] = blocks[: self._width]
        return tables

    def _step_of(self, bucket: int) -> Callable[[], None]:
        rows = _Fields(*(getattr(self._fields, name)[:bucket] for name in _Fields.__slots__))
        nothing = torch.zeros(1, dtype=torch.int32, device=self._backend.device)
        every = torch.arange(bucket, device=self._backend.device)
        tokens, finite = self.result(bucket)

        def step() -> None:
            batch = DecoderInput(
                tokens=self._ids[rows.where],
                positions=rows.positions,
                slots=rows.slots,
                num_decodes=bucket,
                decode_tables=self._tables[:bucket],
                decode_lens=rows.lengths,
                prefill_tables=self._tables[:0],
                query_start=nothing,
                context_lens=nothing[:0],
                sample_rows=every,
            )
            hidden = self._decoder.last_hidden(batch, self._kv)
            logits = self._decoder.logits(hidden, self._logits[:bucket])
            self._kernels.choose(logits, rows.temperatures, rows.starts, tokens, finite)

        return step
