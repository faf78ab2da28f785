"""The Triton kernels in Triton's interpreter, against naive attention and the reference.

Float32 and float16 only: the interpreter computes bfloat16 wrongly without saying so. tests/gpu
runs the same sweep compiled, with bfloat16.
"""

from __future__ import annotations

import os

import pytest
import torch

from baton.errors import ConfigError, InternalError
from baton.kernels import reference
from baton.kernels.dispatch import Kernels, kernels_for
from tests.kernels_kit import (
    LAYERS,
    SCALE,
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

pytest.importorskip("triton", reason="triton is not installed (the extras cuda and dev have it)")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "Triton compiles here, as there is a GPU: tests/gpu runs this sweep on it "
        "(or set TRITON_INTERPRET=1)",
        allow_module_level=True,
    )

PLAIN = Case(32, 2, 16, 0, torch.float32, (33, 16, 1), 2)


@pytest.fixture(scope="module")
def triton() -> Kernels:
    return kernels_for("cpu", "triton")


@pytest.mark.parametrize("case", sweep((torch.float32, torch.float16)), ids=str)
def test_attention_agrees_with_naive_attention(triton: Kernels, case: Case) -> None:
    check_case(triton, case)


@pytest.mark.parametrize("window", [0, 300])
def test_decode_over_several_splits(triton: Kernels, window: int) -> None:
    """Lengths around the boundary of the first split, and sequences that use fewer than others."""
    case = Case(32, 2, 32, window, torch.float32, (700, 255, 256, 257, 513), 1)
    filled = fill(case)
    q = random_queries(case, len(case.lengths))
    sequences = zip(filled.keys, filled.values, strict=True)
    expected = [naive(q[b : b + 1], k, v, window) for b, (k, v) in enumerate(sequences)]
    assert_close(
        decode(triton, case, filled, q, list(case.lengths)), torch.cat(expected), case.dtype
    )


def test_splits_of_a_long_sequence_grow_instead_of_their_number(triton: Kernels) -> None:
    case = Case(32, 1, 256, 0, torch.float16, (9000, 40), 1)  # 32 x 256 tokens are 8192
    filled = fill(case)
    q = random_queries(case, 2)
    sequences = zip(filled.keys, filled.values, strict=True)
    expected = [naive(q[b : b + 1], k, v, 0) for b, (k, v) in enumerate(sequences)]
    assert_close(decode(triton, case, filled, q, [9000, 40]), torch.cat(expected), case.dtype)


def test_decode_is_the_same_bit_for_bit_in_any_batch(triton: Kernels) -> None:
    case = Case(32, 4, 16, 0, torch.float32, (600, 1, 17), 1)
    filled = fill(case)
    q = random_queries(case, 3)
    together = decode(triton, case, filled, q, list(case.lengths))
    for row, length in enumerate(case.lengths):
        needed = -(-length // case.block_size)
        alone = triton.attention_decode(
            q[row : row + 1],
            filled.kv,
            filled.layer,
            filled.block_tables[row : row + 1, :needed].contiguous(),
            int32([length]),
            SCALE,
        )
        assert torch.equal(alone[0], together[row])


def test_a_sequence_of_length_zero_gives_zeros(triton: Kernels) -> None:
    filled = fill(PLAIN)
    filled.block_tables[1] = -1
    q = random_queries(PLAIN, 3)
    out = decode(triton, PLAIN, filled, q, [33, 0, 1])
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert_close(out, decode(kernels_for("cpu"), PLAIN, filled, q, [33, 0, 1]), PLAIN.dtype)


@pytest.mark.parametrize("window", [0, 40])
def test_prefill_of_several_tiles_and_empty_chunks(triton: Kernels, window: int) -> None:
    case = Case(32, 7, 16, window, torch.float16, (100, 5, 70, 64), 1)  # 18 tokens per tile
    filled = fill(case)
    chunks = [60, 0, 70, 1]
    q = random_queries(case, sum(chunks))
    expected = prefill(kernels_for("cpu"), case, filled, q, chunks)
    assert_close(prefill(triton, case, filled, q, chunks), expected, case.dtype)


def test_prefill_of_more_sequences_than_one_step_of_the_owner_search(triton: Kernels) -> None:
    case = Case(32, 1, 16, 0, torch.float32, tuple(1 + number % 3 for number in range(131)), 1)
    filled = fill(case)
    chunks = [1, *[0] * 126, 2, 3, 1, 2]
    q = random_queries(case, sum(chunks))
    expected = prefill(kernels_for("cpu"), case, filled, q, chunks)
    assert_close(prefill(triton, case, filled, q, chunks), expected, case.dtype)


def test_groups_above_the_smallest_tile(triton: Kernels) -> None:
    check_case(triton, Case(32, 24, 16, 0, torch.float32, (20, 9), 1))


def test_prefill_does_not_depend_on_how_the_prompt_was_cut(triton: Kernels) -> None:
    case = Case(32, 2, 16, 0, torch.float32, (50,), 1)
    filled = fill(case)
    q = random_queries(case, 50)
    whole = prefill(triton, case, filled, q, [50])
    for chunk in (1, 37):
        assert_close(prefill(triton, case, filled, q[-chunk:], [chunk]), whole[-chunk:], case.dtype)


def test_empty_inputs_launch_nothing(triton: Kernels) -> None:
    filled = fill(PLAIN)
    none = random_queries(PLAIN, 0)
    tables = filled.block_tables[:0]
    no_slots = torch.tensor([], dtype=torch.int64)
    before = filled.kv.clone()
    assert triton.attention_decode(none, filled.kv, 0, tables, int32([]), SCALE).numel() == 0
    assert (
        triton.attention_prefill(none, filled.kv, 0, tables, int32([0]), int32([]), SCALE).numel()
        == 0
    )
    triton.kv_write(none[:, :2], none[:, :2], filled.kv, 0, no_slots)
    triton.block_copy(filled.kv, no_slots, no_slots)
    torch.testing.assert_close(filled.kv, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 80), (20, 64)])
def test_kv_write_agrees_with_the_reference(
    triton: Kernels, dtype: torch.dtype, kv_heads: int, head_dim: int
) -> None:
    expected = torch.zeros(5, LAYERS, 2, kv_heads, 16, head_dim, dtype=dtype)
    actual = expected.clone()
    fused = torch.randn(4, 3 * kv_heads, head_dim).to(dtype)
    k, v = fused[:, :kv_heads], fused[:, kv_heads : 2 * kv_heads]
    slots = torch.tensor([17, -1, 79, 0])
    reference.kv_write(k, v, expected, 1, slots)
    triton.kv_write(k, v, actual, 1, slots)
    assert torch.equal(actual, expected)
    # Heads whose elements are not side by side are made so first.
    spread = torch.randn(4, kv_heads, head_dim, 2).to(dtype)[..., 0]
    reference.kv_write(spread, spread, expected, 0, slots)
    triton.kv_write(spread, spread, actual, 0, slots)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_copy_agrees_with_the_reference(triton: Kernels, dtype: torch.dtype) -> None:
    expected = torch.randn(6, 3, 2, 2, 16, 80).to(dtype)  # 15360 elements: two programs a block
    actual = expected.clone()
    src, dst = torch.tensor([5, 0, 2]), torch.tensor([1, 4, 3])
    reference.block_copy(expected, src, dst)
    triton.block_copy(actual, src, dst)
    assert torch.equal(actual, expected)


def test_operands_that_do_not_fit_are_refused(triton: Kernels) -> None:
    filled = fill(PLAIN)
    q = random_queries(PLAIN, 3)
    with pytest.raises(InternalError, match="do not fit the pool"):
        decode(triton, PLAIN, filled, q.half(), [33, 16, 1])
    with pytest.raises(InternalError, match="do not fit the pool"):
        decode(triton, PLAIN, filled, q[:, :3], [33, 16, 1])
    with pytest.raises(InternalError, match="must be contiguous"):
        triton.block_copy(filled.kv.transpose(3, 4), torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ConfigError, match="heads of up to 256"):
        check_case(triton, Case(288, 1, 16, 0, torch.float32, (3, 2), 1))
