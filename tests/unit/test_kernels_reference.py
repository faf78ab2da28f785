"""The reference kernels against a naive dense attention in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from baton.kernels import reference
from baton.kernels.dispatch import kernels_for
from tests.kernels_kit import (
    BLOCK_SIZES,
    GROUPS,
    HEAD_DIMS,
    KV_HEADS,
    LAYERS,
    SCALE,
    WINDOWS,
    Case,
    assert_close,
    check_case,
    decode,
    fill,
    int32,
    naive,
    prefill,
    random_queries,
    sweep,
)

REFERENCE = kernels_for("cpu")
PLAIN = Case(32, 2, 16, 0, torch.float32, (33, 16, 1), 2)


def test_the_sweep_covers_every_pair_of_values() -> None:
    dtypes = (torch.float32, torch.float16)
    rows = [
        (c.head_dim, c.group, c.block_size, c.window, c.dtype, c.kv_heads) for c in sweep(dtypes)
    ]
    values = (HEAD_DIMS, GROUPS, BLOCK_SIZES, WINDOWS, dtypes, KV_HEADS)
    for a, b in itertools.combinations(range(len(values)), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(values[a], values[b]))


@pytest.mark.parametrize(
    "case",
    sweep((torch.float32, torch.bfloat16)) + sweep((torch.float16, torch.float32)),
    ids=str,
)
def test_attention_agrees_with_naive_attention(case: Case) -> None:
    check_case(REFERENCE, case)


@pytest.mark.parametrize("window", [0, 1, 8, 600, 5000])
def test_long_chunks_are_cut_into_query_tiles(window: int) -> None:
    case = Case(32, 2, 32, window, torch.float32, (1500, 1100), 1)
    filled = fill(case)
    chunks = [1300, 1100]
    q = random_queries(case, sum(chunks))
    expected = [
        naive(part, k, v, window)
        for part, k, v in zip(q.split_with_sizes(chunks), filled.keys, filled.values, strict=True)
    ]
    assert_close(prefill(REFERENCE, case, filled, q, chunks), torch.cat(expected), case.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 20])
def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(
    dtype: torch.dtype, window: int
) -> None:
    case = Case(64, 4, 32, window, dtype, (700, 3, 64, 65, 1), 2)
    filled = fill(case)
    q = random_queries(case, len(case.lengths))
    together = decode(REFERENCE, case, filled, q, list(case.lengths))
    for row, length in enumerate(case.lengths):
        alone = reference.attention_decode(
            q[row : row + 1],
            filled.kv,
            filled.layer,
            filled.block_tables[row : row + 1],
            int32([length]),
            SCALE,
            window,
        )
        assert torch.equal(alone[0], together[row])

    chunks = list(case.lengths)
    q = random_queries(case, sum(chunks))
    together = prefill(REFERENCE, case, filled, q, chunks)
    begin = 0
    for row, chunk in enumerate(chunks):
        alone = reference.attention_prefill(
            q[begin : begin + chunk],
            filled.kv,
            filled.layer,
            filled.block_tables[row : row + 1],
            int32([0, chunk]),
            int32([0]),
            SCALE,
            window,
        )
        assert torch.equal(alone, together[begin : begin + chunk])
        begin += chunk


def test_decode_continues_where_prefill_ends() -> None:
    filled = fill(PLAIN)
    q = random_queries(PLAIN, sum(PLAIN.lengths))
    last = [sum(PLAIN.lengths[: row + 1]) - 1 for row in range(len(PLAIN.lengths))]
    prefilled = prefill(REFERENCE, PLAIN, filled, q, list(PLAIN.lengths))
    decoded = decode(REFERENCE, PLAIN, filled, q[last], list(PLAIN.lengths))
    assert_close(decoded, prefilled[last], PLAIN.dtype)


def test_a_sequence_of_length_zero_gives_zeros() -> None:
    filled = fill(PLAIN)
    filled.block_tables[1] = -1
    q = random_queries(PLAIN, 3)
    out = decode(REFERENCE, PLAIN, filled, q, [33, 0, 1])
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert_close(out[:1], naive(q[:1], filled.keys[0], filled.values[0], 0), PLAIN.dtype)
    assert not decode(REFERENCE, PLAIN, filled, q, [0, 0, 0]).any()


def test_empty_batches_and_chunks() -> None:
    filled = fill(PLAIN)
    none = random_queries(PLAIN, 0)
    no_table = filled.block_tables[:0]
    assert reference.attention_decode(none, filled.kv, 0, no_table, int32([]), SCALE).shape == (
        0,
        PLAIN.heads,
        PLAIN.head_dim,
    )
    assert reference.attention_prefill(
        none, filled.kv, 0, no_table, int32([0]), int32([]), SCALE
    ).shape == (0, PLAIN.heads, PLAIN.head_dim)
    q = random_queries(PLAIN, 5)
    out = prefill(REFERENCE, PLAIN, filled, q, [0, 5, 0])
    assert_close(out, naive(q, filled.keys[1], filled.values[1], 0), PLAIN.dtype)


def test_a_table_that_is_too_short_is_an_error_and_not_a_shorter_context() -> None:
    filled = fill(PLAIN)
    q = random_queries(PLAIN, 1)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        reference.attention_decode(
            q, filled.kv, filled.layer, filled.block_tables[:1, :2], int32([33]), SCALE
        )


def test_kv_write_puts_tokens_into_their_slots_and_touches_nothing_else() -> None:
    kv = torch.zeros(5, LAYERS, 2, 3, 16, 8)
    fused = torch.randn(4, 9, 8)
    k, v = fused[:, :3], fused[:, 3:6]
    slots = torch.tensor([17, -1, 79, 0])
    reference.kv_write(k, v, kv, 1, slots)
    expected = torch.zeros_like(kv)
    for token in (0, 2, 3):
        block, offset = divmod(int(slots[token]), 16)
        expected[block, 1, 0, :, offset] = k[token]
        expected[block, 1, 1, :, offset] = v[token]
    assert torch.equal(kv, expected)


def test_block_copy_copies_all_layers() -> None:
    kv = torch.randn(6, LAYERS, 2, 2, 16, 8)
    before = kv.clone()
    reference.block_copy(kv, torch.tensor([5, 0]), torch.tensor([1, 4]))
    assert torch.equal(kv[[1, 4]], before[[5, 0]])
    assert torch.equal(kv[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    reference.block_copy(
        kv, torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64)
    )
    assert torch.equal(kv[[1, 4]], before[[5, 0]])
