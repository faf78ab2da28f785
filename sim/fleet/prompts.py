"""Prompts of a trace in units: blocks of the same hash have the same token ids, and others differ.

A block of 512 tokens becomes 512 / grain units. Its first two ids are the hash, so that production
code finds the prefixes that the trace has; the others are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

BLOCK_TOKENS = 512  # of a trace
VOCABULARY = 1 << 16


class Prompts:
    """Makes them for one grain, which divides BLOCK_TOKENS."""

    def __init__(self, grain: int) -> None:
        self.grain = grain
        self.block_units = BLOCK_TOKENS // grain
        self._block = lru_cache(maxsize=1 << 14)(self._make_block)

    def prompt(self, tokens: int, blocks: Sequence[int]) -> tuple[int, ...]:
        """Of `tokens` tokens, the hashes of whose blocks are `blocks`; the last may be partial."""
        units: list[int] = []
        for block in blocks:
            units += self._block(block)
        return tuple(units[: self.units(tokens)])

    def units(self, tokens: int) -> int:
        """At least one."""
        return max(1, -(-tokens // self.grain))

    def answer_units(self, tokens: int) -> int:
        """The first token is a unit of its own: it comes from the prefill."""
        return 1 + -(-max(tokens - 1, 0) // self.grain)

    def _make_block(self, block: int) -> tuple[int, ...]:
        return (block & 0xFFFF, block >> 16, *(0,) * (self.block_units - 2))
