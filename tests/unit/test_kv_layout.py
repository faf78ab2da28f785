"""Byte arithmetic over blocks, coverage of a context, digests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import DigestMismatch, LayoutMismatch, TransportError
from baton.kv.digest import Verify, block_digests, cells_of, check_digests, combine
from baton.kv.layout import Coverage, byte_range, check_layouts, copies_for
from baton.kv.transport.base import Copy
from baton.kv.transport.memory import pool_of
from baton.types.fleet import KvLayout

LAYOUT = KvLayout("0123456789abcdef", "float32", num_layers=4, kv_heads=1, head_dim=8, block_size=4)
LAYER = LAYOUT.layer_bytes
BLOCK = LAYOUT.block_bytes


def test_a_layer_is_keys_and_values_of_one_block() -> None:
    assert LAYER == 2 * 1 * 4 * 8 * 4
    assert BLOCK == 4 * LAYER
    assert byte_range(LAYOUT, 3, 1, 3) == (3 * BLOCK + LAYER, 2 * LAYER)


def test_whole_blocks_that_are_neighbours_on_both_sides_are_one_copy() -> None:
    copies = copies_for(LAYOUT, (4, 5, 6, 9), (1, 2, 7, 8), 0, 4)
    assert copies == [
        Copy(4 * BLOCK, 1 * BLOCK, 2 * BLOCK),
        Copy(6 * BLOCK, 7 * BLOCK, BLOCK),
        Copy(9 * BLOCK, 8 * BLOCK, BLOCK),
    ]


def test_parts_of_blocks_are_never_merged() -> None:
    assert copies_for(LAYOUT, (4, 5), (1, 2), 0, 2) == [
        Copy(4 * BLOCK, 1 * BLOCK, 2 * LAYER),
        Copy(5 * BLOCK, 2 * BLOCK, 2 * LAYER),
    ]


@pytest.mark.parametrize("layers", [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_layers_must_exist(layers: tuple[int, int]) -> None:
    with pytest.raises(TransportError):
        copies_for(LAYOUT, (1,), (1,), *layers)
    with pytest.raises(TransportError):
        Coverage(4).add(0, 1, *layers)


def test_every_remote_block_needs_a_local_one() -> None:
    with pytest.raises(ValueError, match="2 remote"):
        copies_for(LAYOUT, (1, 2), (1,), 0, 4)


blocks = st.lists(st.integers(0, 15), unique=True, min_size=1, max_size=16)


@given(blocks, blocks, st.integers(0, 3), st.integers(1, 4))
def test_copies_move_exactly_the_layers_of_the_blocks(
    remote: list[int], local: list[int], begin: int, layers: int
) -> None:
    end = min(4, begin + layers)
    count = min(len(remote), len(local))
    remote, local = remote[:count], local[:count]
    source = np.random.default_rng(1).integers(0, 256, 16 * BLOCK, dtype=np.uint8)
    target = np.zeros(16 * BLOCK, dtype=np.uint8)
    for c in copies_for(LAYOUT, remote, local, begin, end):
        target[c.local : c.local + c.length] = source[c.remote : c.remote + c.length]
    shape = (16, 4, LAYER)
    expected = np.zeros(shape, dtype=np.uint8)
    expected[local, begin:end] = source.reshape(shape)[remote, begin:end]
    assert np.array_equal(target.reshape(shape), expected)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(0, 2)), max_size=12))
def test_coverage_agrees_with_a_table(ranges: list[tuple[int, int, int]]) -> None:
    coverage, table = Coverage(4), np.zeros((12, 4), dtype=bool)
    for first, count, layer in ranges:
        cells = table[first : first + count, layer : layer + 2]
        if cells.any():
            with pytest.raises(TransportError, match="twice"):
                coverage.add(first, count, layer, layer + 2)
        else:
            coverage.add(first, count, layer, layer + 2)
            cells[:] = True
    for n in range(12):
        short = [b for b in range(n) if not table[b].all()]
        beyond = [b for b in range(n, 12) if table[b].any()]
        assert coverage.missing(n) == short + beyond


def test_a_layout_mismatch_names_both_sides_and_the_difference() -> None:
    other = dataclasses.replace(LAYOUT, dtype="bfloat16", block_size=8)
    check_layouts(LAYOUT, "p0", dataclasses.replace(LAYOUT), "d0")
    with pytest.raises(LayoutMismatch) as caught:
        check_layouts(LAYOUT, "p0", other, "d0")
    for part in ("p0", "d0", LAYOUT.describe(), other.describe(), "dtype, block_size"):
        assert part in caught.value.message


BIG = dataclasses.replace(LAYOUT, block_size=256, kv_heads=2)


@pytest.mark.parametrize("mode", [Verify.SAMPLE, Verify.FULL])
def test_digests_tell_blocks_apart(mode: Verify) -> None:
    memory = pool_of(np.random.default_rng(0).integers(0, 256, 4 * BIG.block_bytes, dtype=np.uint8))
    digests = block_digests(memory, BIG, (0, 3), 1, 3, mode)
    assert len(digests) == 2
    assert len(digests[0]) == 17
    check_digests(memory, BIG, (0, 3), 1, 3, digests, "p0")
    for blocks, layers in (((3, 0), (1, 3)), ((0, 3), (0, 2)), ((0, 2), (1, 3))):
        with pytest.raises(DigestMismatch, match="p0"):
            check_digests(memory, BIG, blocks, *layers, digests, "p0")
    with pytest.raises(DigestMismatch, match="2 digests for 1"):
        check_digests(memory, BIG, (0,), 1, 3, digests, "p0")
    with pytest.raises(DigestMismatch, match="unknown kind"):
        check_digests(memory, BIG, (0,), 1, 3, (b"?" + bytes(16),), "p0")


def test_full_digests_see_every_bit_and_samples_see_torn_blocks() -> None:
    memory = pool_of(np.zeros(BIG.block_bytes, dtype=np.uint8))
    data = np.asarray(memory.buffer)
    full = block_digests(memory, BIG, (0,), 0, 4, Verify.FULL)
    sample = block_digests(memory, BIG, (0,), 0, 4, Verify.SAMPLE)
    data[12345] = 1
    assert block_digests(memory, BIG, (0,), 0, 4, Verify.FULL) != full
    data[12345] = 0
    data[data.nbytes // 2 :] = 1
    assert block_digests(memory, BIG, (0,), 0, 4, Verify.SAMPLE) != sample
    assert block_digests(memory, BIG, (0,), 0, 4, Verify.OFF) == ()


@given(st.permutations(range(6)))
def test_the_digest_of_an_attempt_does_not_depend_on_the_order_of_arrival(order: list[int]) -> None:
    cells = cells_of(0, 0, [b"a", b"b", b"c"]) + cells_of(0, 2, [b"d", b"e", b"f"])
    assert combine(cells[n] for n in order) == combine(cells)
    assert combine(cells[1:]) != combine(cells)
    assert combine([]) == b""
