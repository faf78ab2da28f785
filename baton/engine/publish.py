"""Puts the KV of sequences that are handed off under lease, as soon as it is final.

    blocks of one sequence, block size 4, a chunk computes tokens [6, 13) of a 13-token prompt:

        |....|..xx|xxxx|x---|        first = 1 (block 1 was partial before this chunk)
          0    1    2    3           last  = 4 (the prompt ends: its partial block is final too)

While the step runs, layer groups of blocks [first, last) become final one after the other. They are
published one by one where there is enough in them to be worth a message each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.engine.batch import BatchItem
from baton.engine.block_pool import BlockPool
from baton.engine.events import KvReady
from baton.engine.sequence import Sequence
from baton.types.fleet import KvLayout


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Blocks [first, last) of the sequence become final in this step."""

    sequence: Sequence
    first: int
    last: int
    by_layers: bool


class Publisher:
    """One step at a time, the one that runs: `begin`, any number of `layers_ready`, then `end` or
    `abandon`. The step after it begins here when this one has been committed."""

    def __init__(self, pool: BlockPool, layout: KvLayout, by_layers_bytes: int = 0) -> None:
        """Chunks with less KV than `by_layers_bytes` are published in one piece, at their end."""
        self._pool = pool
        self._layout = layout
        self._by_layers_tokens = by_layers_bytes * layout.block_size / layout.block_bytes
        self._chunks: list[_Chunk] = []
        self._layers = 0  # of those that go by layers: already published in this step

    def goes_by_layers(self, item: BatchItem) -> bool:
        """Whether the item's KV is published layer group by layer group."""
        return item.length >= self._by_layers_tokens

    def begin(self, items: Iterable[tuple[Sequence, BatchItem]]) -> tuple[KvReady, ...]:
        """Note what the step will make final, of sequences with `hand_off`: what it computes for
        them, and what others compute in it that they share. Returns what was final before: prefix
        cache hits."""
        hits = []
        self._layers = 0
        for sequence, item in items:
            final = sequence.computed // self._layout.block_size
            if final > sequence.leased:
                hits.append(self._publish(sequence, sequence.leased, final, 0, self._all_layers))
            end = item.start + item.length
            complete = end == len(sequence.context)
            last = self._layout.blocks_for(end) if complete else end // self._layout.block_size
            if last > sequence.leased:
                by_layers = self.goes_by_layers(item)
                self._chunks.append(_Chunk(sequence, sequence.leased, last, by_layers))
        return tuple(hits)

    def layers_ready(self, layer_end: int) -> tuple[KvReady, ...]:
        """Layers up to `layer_end` of the whole step are final."""
        begin, self._layers = self._layers, max(layer_end, self._layers)
        if begin == self._layers:
            return ()
        return tuple(
            self._publish(chunk.sequence, chunk.first, chunk.last, begin, self._layers)
            for chunk in self._chunks
            if chunk.by_layers and chunk.sequence.ending is None
        )

    def end(self) -> tuple[KvReady, ...]:
        """The step has been executed: publish what no callback has announced."""
        rest = self.layers_ready(self._all_layers)
        whole = tuple(
            self._publish(chunk.sequence, chunk.first, chunk.last, 0, self._all_layers)
            for chunk in self._chunks
            if not chunk.by_layers and chunk.sequence.ending is None
        )
        self._chunks.clear()
        return (*rest, *whole)

    def abandon(self) -> None:
        """The step failed, or was not run."""
        self._chunks.clear()

    @property
    def _all_layers(self) -> int:
        return self._layout.num_layers

    def _publish(
        self, sequence: Sequence, first: int, last: int, layer_begin: int, layer_end: int
    ) -> KvReady:
        if last > sequence.leased:
            self._pool.lease(sequence.blocks[sequence.leased : last])
            sequence.leased = last
        return KvReady(
            sequence.task.attempt, first, sequence.blocks[first:last], layer_begin, layer_end
        )
