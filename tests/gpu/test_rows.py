"""The row-wise kernels, compiled: bfloat16 above all, and shapes of real models."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import noise, reference_rows
from baton.kernels.dispatch import Kernels, kernels_for
from tests.rows_kit import (
    SHAPES,
    Projected,
    check_add_rms_norm,
    check_choose,
    check_norm_rope_write,
    check_rms_norm,
    check_silu_mul,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LARGE = [
    Projected(300, 32, 8, 128, 32, norm=True),
    Projected(17, 28, 4, 128, 64, norm=False),
    Projected(64, 64, 8, 80, 128, norm=False),
]


@pytest.fixture
def triton() -> Kernels:
    return kernels_for("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 3000), (257, 4096), (3, 28_672)])
def test_norms_and_activation(triton: Kernels, rows: int, size: int, dtype: torch.dtype) -> None:
    check_rms_norm(triton, rows, size, dtype, "cuda")
    check_add_rms_norm(triton, rows, size, dtype, "cuda")
    check_silu_mul(triton, rows, size, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
def test_norm_rope_write(triton: Kernels, shape: Projected, dtype: torch.dtype) -> None:
    check_norm_rope_write(triton, shape, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 100), (64, 32_000), (7, 151_936), (3, 2048)])
def test_choose(triton: Kernels, rows: int, vocab: int, dtype: torch.dtype) -> None:
    check_choose(triton, rows, vocab, dtype, "cuda")


def test_draws_are_the_reference_s_on_the_cpu(triton: Kernels) -> None:
    """2,000 draws: another token would mean other noise, not other rounding."""
    rows, vocab = 2000, 1000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([noise.stream_start(3, index) for index in range(rows)])
    temperatures = torch.full((rows,), 0.7)
    expected, actual = torch.empty(2, rows, dtype=torch.int64), torch.empty(2, rows).long().cuda()
    reference_rows.choose(logits, temperatures, starts, expected[0], expected[1])
    triton.choose(logits.cuda(), temperatures.cuda(), starts.cuda(), actual[0], actual[1])
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_finite_are_reported(triton: Kernels, temperature: float) -> None:
    logits = torch.randn(5, 30_000, device="cuda")
    logits[0, 29_999] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = -torch.inf
    tokens, finite = torch.empty(2, 5, dtype=torch.int64, device="cuda")
    starts = torch.arange(5, device="cuda")
    triton.choose(logits, torch.full((5,), temperature, device="cuda"), starts, tokens, finite)
    assert finite.tolist() == [0, 0, 0, 1, 1]
    assert ((tokens >= 0) & (tokens < 30_000)).all()
