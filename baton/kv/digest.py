"""Digests of published KV, so that the reader can tell what it read from what was published.

A digest covers one block's run of layers. `full` hashes every byte; `sample` does so for short runs
and hashes PIECES pieces spread evenly over long ones, which finds blocks that are torn, missing or
in the wrong place at a cost that does not grow with the block. The first byte names the mode, so a
reader needs no setting of its own: it verifies whatever the publisher says.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, TypeVar

import xxhash

from baton.errors import DigestMismatch
from baton.kv.layout import byte_range
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.memory import host_runs
from baton.types.fleet import KvLayout

PIECES = 8
PIECE_BYTES = 512
SHORT = 64 << 10  # bytes; hashing them all costs as much as hashing the pieces

T = TypeVar("T")

Cell = tuple[int, int, bytes]
"""(logical block, first layer, digest): what the digest of a whole attempt is made of."""


class Verify(StrEnum):
    OFF = "off"
    SAMPLE = "sample"
    FULL = "full"


_TAGS = {Verify.SAMPLE: b"s", Verify.FULL: b"f"}
_MODES = {tag: mode for mode, tag in _TAGS.items()}


def hashed_bytes(layout: KvLayout, blocks: int, layers: int, mode: Verify) -> int:
    """How much `block_digests` hashes."""
    if mode is Verify.OFF:
        return 0
    run = layers * layout.layer_bytes
    return blocks * (run if mode is Verify.FULL or run <= SHORT else PIECES * PIECE_BYTES)


def block_digests(
    memory: PoolMemory,
    layout: KvLayout,
    blocks: Sequence[int],
    layer_begin: int,
    layer_end: int,
    mode: Verify,
) -> tuple[bytes, ...]:
    """One digest per block (17 bytes), or none when the mode is off."""
    if mode is Verify.OFF:
        return ()
    runs = _runs(memory, layout, blocks, layer_begin, layer_end)
    return tuple(_digest(run, mode) for run in runs)


def check_digests(
    memory: PoolMemory,
    layout: KvLayout,
    blocks: Sequence[int],
    layer_begin: int,
    layer_end: int,
    expected: Sequence[bytes],
    source: str,
) -> None:
    """Raises DigestMismatch when local `blocks` are not what `source` published."""
    if not expected:
        return
    if len(expected) != len(blocks):
        raise DigestMismatch(f"{source} sent {len(expected)} digests for {len(blocks)} blocks")
    runs = _runs(memory, layout, blocks, layer_begin, layer_end)
    for block, run, digest in zip(blocks, runs, expected, strict=True):
        mode = _MODES.get(digest[:1])
        if mode is None:
            raise DigestMismatch(f"{source} sent a digest of an unknown kind: {digest[:1]!r}")
        if _digest(run, mode) != digest:
            raise DigestMismatch(
                f"layers [{layer_begin}, {layer_end}) of block {block} differ from what {source} "
                "published; the read is discarded"
            )


async def make_digests(
    memory: PoolMemory,
    layout: KvLayout,
    blocks: Sequence[int],
    mode: Verify,
    inline_bytes: int,
) -> tuple[bytes, ...]:
    """`block_digests` of whole blocks; in a thread when more than `inline_bytes` are hashed."""
    work = functools.partial(block_digests, memory, layout, blocks, 0, layout.num_layers, mode)
    if mode is Verify.OFF or not blocks:
        return ()
    nbytes = hashed_bytes(layout, len(blocks), layout.num_layers, mode)
    return await _run(work, memory, nbytes, inline_bytes)


async def verify_digests(
    memory: PoolMemory,
    layout: KvLayout,
    blocks: Sequence[int],
    layers: tuple[int, int],
    expected: Sequence[bytes],
    source: str,
    inline_bytes: int,
) -> None:
    """`check_digests`; in a thread when more than `inline_bytes` may be hashed. When this is
    cancelled meanwhile, the thread only reads, and nobody hears what came of it."""
    work = functools.partial(check_digests, memory, layout, blocks, *layers, expected, source)
    nbytes = len(expected) * (layers[1] - layers[0]) * layout.layer_bytes  # at most
    await _run(work, memory, nbytes, inline_bytes)


async def _run(work: Callable[[], T], memory: PoolMemory, nbytes: int, inline_bytes: int) -> T:
    if nbytes == 0 or (memory.device == "cpu" and nbytes <= inline_bytes):
        return work()
    return await asyncio.to_thread(work)


def combine(cells: Iterable[Cell]) -> bytes:
    """Digest of an attempt, whatever order its ranges came in. Empty for no digests."""
    hasher = xxhash.xxh3_128()
    empty = True
    for block, layer, digest in sorted(cells):
        hasher.update(b"%d:%d:" % (block, layer))
        hasher.update(digest)
        empty = False
    return b"" if empty else hasher.digest()


def cells_of(first_block: int, layer_begin: int, digests: Sequence[bytes]) -> list[Cell]:
    return [(first_block + n, layer_begin, digest) for n, digest in enumerate(digests)]


def _runs(
    memory: PoolMemory, layout: KvLayout, blocks: Sequence[int], layer_begin: int, layer_end: int
) -> Iterator[memoryview]:
    """The bytes of layers [layer_begin, layer_end) of each block."""
    first, length = byte_range(layout, 0, layer_begin, layer_end)
    stride = layout.block_bytes
    if memory.device == "cpu":
        buffer: Any = memory.buffer
        pool = memoryview(buffer[: memory.nbytes])  # once: a view per block is what costs here
        for block in blocks:
            start = block * stride + first
            yield pool[start : start + length]
    else:
        yield from host_runs(memory, stride, blocks, first, length)


def _digest(data: memoryview, mode: Verify) -> bytes:
    if mode is Verify.FULL or data.nbytes <= SHORT:
        return _TAGS[mode] + xxhash.xxh3_128_digest(data)
    hasher = xxhash.xxh3_128()
    for piece in range(PIECES):
        start = piece * (data.nbytes - PIECE_BYTES) // (PIECES - 1)
        hasher.update(data[start : start + PIECE_BYTES])
    return _TAGS[mode] + hasher.digest()
