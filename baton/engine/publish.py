"""Puts the KV of sequences that are handed off under lease, as soon as it is final.

    blocks of one sequence, block size 4, a chunk computes tokens [6, 13) of a 13-token prompt:

        |....|..xx|xxxx|x---|        first = 1 (block 1 was partial before this chunk)
          0    1    2    3           last  = 4 (the prompt ends: its partial block is final too)

While the step runs, layer groups of blocks [first, last) become final one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from baton.engine.batch import BatchItem
from baton.engine.block_pool import BlockPool
from baton.engine.events import KvReady
from baton.engine.sequence import Sequence
from baton.types.fleet import KvLayout


class Publisher:
    """One step at a time, the one that runs: `begin`, any number of `layers_ready`, then `end` or
    `abandon`. The step after it begins here when this one has been committed."""

    def __init__(self, pool: BlockPool, layout: KvLayout) -> None:
        self._pool = pool
        self._layout = layout
        self._chunks: list[tuple[Sequence, int, int]] = []  # (sequence, first, last)
        self._layers = 0  # already published in this step

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
                self._chunks.append((sequence, sequence.leased, last))
        return tuple(hits)

    def layers_ready(self, layer_end: int) -> tuple[KvReady, ...]:
        """Layers up to `layer_end` of the whole step are final."""
        begin, self._layers = self._layers, max(layer_end, self._layers)
        if begin == self._layers:
            return ()
        return tuple(
            self._publish(sequence, first, last, begin, self._layers)
            for sequence, first, last in self._chunks
            if sequence.ending is None
        )

    def end(self) -> tuple[KvReady, ...]:
        """The step has been executed: publish what no callback has announced."""
        ready = self.layers_ready(self._all_layers)
        self._chunks.clear()
        return ready

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
