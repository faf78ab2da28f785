"""Finds the blocks of a context that are already computed, by their chained keys; and those that
steps in flight compute, so that prompts which arrive together compute what they share only once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from baton.engine.block_pool import BlockPool
from baton.engine.events import KvFilled
from baton.engine.sequence import Sequence
from baton.hashing import block_keys, root_key
from baton.types.fleet import KvLayout


class Prefix(NamedTuple):
    """The longest chain of known blocks of a context."""

    blocks: tuple[int, ...]
    computed: int  # of the blocks, at least; the others are filled by steps in flight
    next_key: bytes | None  # of the block behind them; None when nobody could share that one


class PrefixCache:
    """Keys are computed once per sequence and block, and live in `Sequence.keys`."""

    def __init__(self, pool: BlockPool, layout: KvLayout, enabled: bool) -> None:
        self._pool = pool
        self._layout = layout
        self._enabled = enabled
        self._coming: dict[bytes, int] = {}  # blocks that steps in flight fill
        self._filled: list[KvFilled] = []

    def match(self, sequence: Sequence) -> Prefix:
        """What the caller must share at once. The KV is there when the steps in flight have ended.

        Never covers the last token of the context: its logits must be computed.
        """
        if not self._enabled:
            return Prefix((), 0, None)
        limit = (len(sequence.context) - 1) // self._layout.block_size
        blocks: list[int] = []
        computed = 0
        for key in self._keys(sequence, limit)[:limit]:
            block = self._pool.lookup(key)
            if block is not None:
                computed += computed == len(blocks)
            elif (block := self._coming.get(key)) is None:
                return Prefix(tuple(blocks), computed, key)
            blocks.append(block)
        return Prefix(tuple(blocks), computed, None)

    def key_at(self, sequence: Sequence, position: int) -> bytes | None:
        """Of the block that the token is in; None when nobody can share it."""
        index = position // self._layout.block_size
        if not self._enabled or (index + 1) * self._layout.block_size > len(sequence.context):
            return None
        return self._keys(sequence, index + 1)[index]

    def expect(self, sequence: Sequence, begin: int, end: int) -> list[bytes]:
        """A step will compute tokens [begin, end), which are known: until `forget` is called with
        the keys that this returns, `match` finds the blocks that it fills."""
        first = begin // self._layout.block_size
        last = end // self._layout.block_size
        if not self._enabled or first == last:
            return []
        fills = zip(
            self._keys(sequence, last)[first:last], sequence.blocks[first:last], strict=True
        )
        coming = {key: block for key, block in fills if key not in self._coming}
        self._coming |= coming
        return list(coming)

    def forget(self, keys: Iterable[bytes]) -> None:
        """The step has ended or was given up: from here on, only what is registered is found."""
        for key in keys:
            del self._coming[key]

    @property
    def num_expected(self) -> int:
        return len(self._coming)

    def register(self, sequence: Sequence, computed_before: int) -> None:
        """Offer the blocks that were filled since `computed_before` tokens were computed."""
        first = computed_before // self._layout.block_size
        last = sequence.computed // self._layout.block_size
        if not self._enabled or first == last:
            return
        keys = self._keys(sequence, last)
        for index in range(first, last):
            self._pool.register(sequence.blocks[index], keys[index])
        parent = keys[first - 1] if first else b""
        self._filled.append(KvFilled(first, b"".join(keys[first:last]), parent))

    def take_filled(self) -> tuple[KvFilled, ...]:
        """What was offered since the last call."""
        filled = tuple(self._filled)
        self._filled.clear()
        return filled

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
