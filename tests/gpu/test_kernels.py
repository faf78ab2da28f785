"""The compiled Triton kernels: the interpreter's sweep, bfloat16, and what only a GPU shows."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import reference
from baton.kernels.dispatch import Kernels, kernels_for
from tests.kernels_kit import (
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

pytestmark = pytest.mark.gpu


@pytest.fixture
def triton() -> Kernels:
    return kernels_for("cuda")


@pytest.mark.parametrize(
    "case",
    [
        *sweep((torch.bfloat16, torch.float16)),
        *sweep((torch.float16, torch.bfloat16)),
        *sweep((torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_attention_agrees_with_naive_attention(triton: Kernels, case: Case) -> None:
    check_case(triton, case, "cuda")


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_contexts(triton: Kernels, head_dim: int, window: int) -> None:
    case = Case(head_dim, 4, 32, window, torch.bfloat16, (20_000, 8192, 8193, 1500, 1), 2)
    filled = fill(case, "cuda")
    sequences = list(zip(filled.keys, filled.values, strict=True))
    q = random_queries(case, 5, "cuda")
    expected = [naive(q[b : b + 1], k, v, window) for b, (k, v) in enumerate(sequences)]
    assert_close(
        decode(triton, case, filled, q, list(case.lengths)), torch.cat(expected), case.dtype
    )
    chunks = [513, 0, 1000, 1500, 1]
    q = random_queries(case, sum(chunks), "cuda")
    parts = q.split_with_sizes(chunks)
    expected = [naive(p, k, v, window) for p, (k, v) in zip(parts, sequences, strict=True)]
    assert_close(prefill(triton, case, filled, q, chunks), torch.cat(expected), case.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_same_bits_in_any_batch_and_for_any_chunks(triton: Kernels, dtype: torch.dtype) -> None:
    case = Case(128, 4, 32, 0, dtype, (3000, 1, 257), 2)
    filled = fill(case, "cuda")
    q = random_queries(case, 3, "cuda")
    together = decode(triton, case, filled, q, list(case.lengths))
    for row, length in enumerate(case.lengths):
        alone = triton.attention_decode(
            q[row : row + 1],
            filled.kv,
            filled.layer,
            filled.block_tables[row : row + 1],
            int32([length], "cuda"),
            SCALE,
        )
        assert torch.equal(alone[0], together[row])
    one = Case(128, 4, 32, 0, dtype, (3000,), 2)
    filled = fill(one, "cuda")
    q = random_queries(one, 3000, "cuda")
    whole = prefill(triton, one, filled, q, [3000])
    for chunk in (1, 100, 1777):
        assert torch.equal(prefill(triton, one, filled, q[-chunk:], [chunk]), whole[-chunk:])


def test_pools_above_two_to_the_31_elements(triton: Kernels) -> None:
    """Offsets need 64 bits: everything happens in the last blocks of a 4.4 GB pool."""
    num_blocks, kv_heads, block_size, head_dim = 17_000, 8, 64, 128
    shape = (num_blocks, 1, 2, kv_heads, block_size, head_dim)
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    kv = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    assert kv.numel() > 2**31
    k, v = torch.randn(2, 100, kv_heads, head_dim, device="cuda").bfloat16()
    position = torch.arange(100, device="cuda")
    table = torch.tensor([num_blocks - 2, num_blocks - 3], device="cuda")
    slots = table[position // block_size] * block_size + position % block_size
    triton.kv_write(k, v, kv, 0, slots)
    triton.block_copy(kv, table[:1], torch.tensor([num_blocks - 1], device="cuda"))
    assert torch.equal(kv[-1], kv[-2])
    assert torch.equal(kv[-1, 0, 0].transpose(0, 1), k[:block_size])
    blocks = torch.tensor([[num_blocks - 1, num_blocks - 3]], dtype=torch.int32, device="cuda")
    q = torch.randn(100, 16, head_dim, device="cuda").bfloat16()
    expected = naive(q, k, v, 0)
    starts, contexts = int32([0, 100], "cuda"), int32([0], "cuda")
    actual = triton.attention_prefill(q, kv, 0, blocks, starts, contexts, SCALE)
    assert_close(actual, expected, torch.bfloat16)
    actual = triton.attention_decode(q[-1:], kv, 0, blocks, int32([100], "cuda"), SCALE)
    assert_close(actual, expected[-1:], torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(3, 80), (20, 64)])
def test_copies_agree_with_the_reference(
    triton: Kernels, dtype: torch.dtype, kv_heads: int, head_dim: int
) -> None:
    expected = torch.zeros(5, 3, 2, kv_heads, 16, head_dim, dtype=dtype, device="cuda")
    actual = expected.clone()
    fused = torch.randn(4, 3 * kv_heads, head_dim, device="cuda").to(dtype)
    k, v = fused[:, :kv_heads], fused[:, kv_heads : 2 * kv_heads]
    slots = torch.tensor([17, -1, 79, 0], device="cuda")
    src, dst = torch.tensor([1, 4], device="cuda"), torch.tensor([2, 3], device="cuda")
    reference.kv_write(k, v, expected, 1, slots)
    reference.block_copy(expected, src, dst)
    triton.kv_write(k, v, actual, 1, slots)
    triton.block_copy(actual, src, dst)
    assert torch.equal(actual, expected)


def test_decode_is_captured_once_and_replayed_for_other_lengths(triton: Kernels) -> None:
    case = Case(128, 4, 32, 0, torch.bfloat16, (900, 40), 2)
    filled = fill(case, "cuda")
    q = random_queries(case, 2, "cuda").contiguous()
    lengths = int32([1, 1], "cuda")

    def step() -> torch.Tensor:
        return triton.attention_decode(
            q, filled.kv, filled.layer, filled.block_tables, lengths, SCALE
        )

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for current in ([900, 40], [257, 0], [31, 32]):
        lengths.copy_(int32(current, "cuda"))
        graph.replay()
        assert torch.equal(out, decode(triton, case, filled, q, current))


def test_joining_is_the_same_every_time(triton: Kernels) -> None:
    """Stretches of many lengths end in any order; a partial result that was not there yet when it
    was joined would show as another bit, and a counter that was not reset as garbage."""
    case = Case(128, 4, 32, 0, torch.bfloat16, tuple(range(300, 9000, 290)), 2)
    filled = fill(case, "cuda")
    q = random_queries(case, len(case.lengths), "cuda")
    first = decode(triton, case, filled, q, list(case.lengths))
    for _ in range(200):
        assert torch.equal(decode(triton, case, filled, q, list(case.lengths)), first)
