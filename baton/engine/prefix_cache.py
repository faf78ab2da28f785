"""Finds the blocks of a context that are already computed, by their chained keys."""

from __future__ import annotations

from baton.engine.block_pool import BlockPool
from baton.engine.sequence import Sequence
from baton.hashing import block_keys, root_key
from baton.types.fleet import KvLayout


class PrefixCache:
    """Keys are computed once per sequence and block, and live in `Sequence.keys`."""

    def __init__(self, pool: BlockPool, layout: KvLayout, enabled: bool) -> None:
        self._pool = pool
        self._layout = layout
        self._enabled = enabled

    def match(self, sequence: Sequence) -> tuple[int, ...]:
        """The longest chain of known blocks, which the caller must share at once.

        Never covers the last token of the context: its logits must be computed.
        """
        if not self._enabled:
            return ()
        limit = (len(sequence.context) - 1) // self._layout.block_size
        blocks = []
        for key in self._keys(sequence, limit)[:limit]:
            block = self._pool.lookup(key)
            if block is None:
                break
            blocks.append(block)
        return tuple(blocks)

    def register(self, sequence: Sequence, computed_before: int) -> None:
        """Offer the blocks that were filled since `computed_before` tokens were computed."""
        first = computed_before // self._layout.block_size
        last = sequence.computed // self._layout.block_size
        if not self._enabled or first == last:
            return
        keys = self._keys(sequence, last)
        for index in range(first, last):
            self._pool.register(sequence.blocks[index], keys[index])

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """At least `count` keys; the context holds as many full blocks."""
        keys = sequence.keys
        if len(keys) < count:
            size = self._layout.block_size
            parent = keys[-1] if keys else self._root(sequence.task.cache_salt)
            keys += block_keys(parent, sequence.context[len(keys) * size : count * size], size)
        return keys

    def _root(self, cache_salt: str) -> bytes:
        layout = self._layout
        return root_key(
            layout.model, layout.dtype, layout.block_size, layout.quantization, cache_salt
        )
