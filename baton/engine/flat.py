"""A batch as flat arrays on the host, in the form in which a decoder takes it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from baton.engine.batch import Batch, BatchItem

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The arrays of a `DecoderInput`. The tokens of items that follow are 0 here."""

    tokens: Array
    positions: Array
    slots: Array
    decode_tables: Array
    decode_lens: Array
    prefill_tables: Array
    query_start: Array
    context_lens: Array
    sample_rows: Array

    @property
    def num_decodes(self) -> int:
        return len(self.decode_lens)

    def arrays(self) -> dict[str, Array]:
        """By name, contiguous, of the types that the kernels want."""
        return {
            field.name: np.ascontiguousarray(getattr(self, field.name)) for field in fields(self)
        }


def flatten(batch: Batch, block_size: int) -> FlatBatch:
    """Leading one-token items are decodes, the rest prefill chunks."""
    items = batch.items
    decodes = next((i for i, item in enumerate(items) if item.length != 1), len(items))
    lengths = np.array([item.length for item in items], dtype=np.int64)
    starts = np.array([item.start for item in items], dtype=np.int64)
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(items)), lengths)  # item of each token
    positions = np.arange(ends[-1]) - (ends - lengths)[row] + starts[row]
    tables = _block_tables(items)
    slots = tables[row, positions // block_size] * block_size + positions % block_size
    sampled = np.array([item.sample is not None for item in items])
    tokens = [np.array((0,) if item.follows else item.tokens, dtype=np.int64) for item in items]
    return FlatBatch(
        tokens=np.concatenate(tokens),
        positions=positions,
        slots=slots,
        decode_tables=tables[:decodes].astype(np.int32),
        decode_lens=(starts[:decodes] + 1).astype(np.int32),
        prefill_tables=tables[decodes:].astype(np.int32),
        query_start=np.concatenate(([0], np.cumsum(lengths[decodes:]))).astype(np.int32),
        context_lens=starts[decodes:].astype(np.int32),
        sample_rows=ends[sampled] - 1,
    )


def _block_tables(items: tuple[BatchItem, ...]) -> Array:
    """`[items, max_blocks]` int64; rows end in zeros that nothing reads."""
    tables = np.zeros((len(items), max(len(item.blocks) for item in items)), dtype=np.int64)
    for row, item in enumerate(items):
        tables[row, : len(item.blocks)] = item.blocks
    return tables
