"""Byte arithmetic over block pools: which bytes are layers [a, b) of block n.

    pool    | block 0             | block 1             | block 2 ...
    block   | layer 0 | layer 1 | ...                      block_bytes each
    layer   | K [heads, tokens, dim] | V [heads, tokens, dim]    layer_bytes each

A run of layers of one block is contiguous; whole blocks that are neighbours in both pools are too.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.errors import LayoutMismatch, TransportError
from baton.kv.transport.base import Copy
from baton.types.fleet import KvLayout


def check_layouts(ours: KvLayout, our_name: str, theirs: KvLayout, their_name: str) -> None:
    """Raises LayoutMismatch, which names both sides and the fields that differ."""
    if ours == theirs:
        return
    differing = [
        name for name in KvLayout.__slots__ if getattr(ours, name) != getattr(theirs, name)
    ]
    raise LayoutMismatch(
        f"KV blocks of {our_name} ({ours.describe()}) and {their_name} ({theirs.describe()}) "
        f"differ in {', '.join(differing)}; start both workers with the same model, dtype and "
        "block size"
    )


def byte_range(layout: KvLayout, block: int, layer_begin: int, layer_end: int) -> tuple[int, int]:
    """(offset, length) in bytes of layers [layer_begin, layer_end) of `block` in a pool."""
    offset = block * layout.block_bytes + layer_begin * layout.layer_bytes
    return offset, (layer_end - layer_begin) * layout.layer_bytes


def copies_for(
    layout: KvLayout,
    remote_blocks: Sequence[int],
    local_blocks: Sequence[int],
    layer_begin: int,
    layer_end: int,
) -> list[Copy]:
    """Copies that bring layers of `remote_blocks[i]` into `local_blocks[i]`, neighbours merged.

    remote  4 5 6 9        local  1 2 7 8        all layers: 4,5 -> 1,2 | 6 -> 7 | 9 -> 8
    """
    if len(remote_blocks) != len(local_blocks):
        raise ValueError(f"{len(remote_blocks)} remote blocks for {len(local_blocks)} local ones")
    if not 0 <= layer_begin < layer_end <= layout.num_layers:
        raise TransportError(
            f"layers [{layer_begin}, {layer_end}) are not in a model of {layout.num_layers} layers"
        )
    first, run = byte_range(layout, 0, layer_begin, layer_end)
    stride = layout.block_bytes
    merged: list[Copy] = []
    remote_end = local_end = -1
    for remote_block, local_block in zip(remote_blocks, local_blocks, strict=True):
        remote, local, length = remote_block * stride + first, local_block * stride + first, run
        if remote == remote_end and local == local_end:
            last = merged.pop()
            remote, local, length = last.remote, last.local, last.length + run
        merged.append(Copy(remote, local, length))
        remote_end, local_end = remote + length, local + length
    return merged


class Coverage:
    """Which (block, layer) cells of a sequence have been seen; no cell twice.

              block 0  1  2  3
    layer 0         x  x  x  .      add(0, 3, 0, 1)
    layer 1         x  x  .  .      add(0, 2, 1, 2)
    """

    def __init__(self, num_layers: int) -> None:
        self._full = (1 << num_layers) - 1
        self._num_layers = num_layers
        self._seen: dict[int, int] = {}  # logical block -> bit per layer

    def add(self, first_block: int, count: int, layer_begin: int, layer_end: int) -> None:
        """Raises TransportError for a cell that was already covered or cannot exist."""
        if first_block < 0 or not 0 <= layer_begin < layer_end <= self._num_layers:
            raise TransportError(
                f"a published range is impossible: block {first_block}, layers [{layer_begin}, "
                f"{layer_end}) of {self._num_layers}"
            )
        bits = (1 << layer_end) - (1 << layer_begin)
        blocks = range(first_block, first_block + count)
        for block in blocks:
            if self._seen.get(block, 0) & bits:
                raise TransportError(
                    f"layers [{layer_begin}, {layer_end}) of block {block} were published twice"
                )
        for block in blocks:
            self._seen[block] = self._seen.get(block, 0) | bits

    def missing(self, num_blocks: int) -> list[int]:
        """Logical blocks below `num_blocks` that lack a layer, and covered ones beyond it."""
        short = [n for n in range(num_blocks) if self._seen.get(n, 0) != self._full]
        return short + sorted(n for n in self._seen if n >= num_blocks)
