"""What is done to rows: the reference against plain formulas, Triton (interpreted) against it."""

from __future__ import annotations

import os

import pytest
import torch

from baton.errors import ConfigError, InternalError
from baton.kernels import noise, reference_rows
from baton.kernels.dispatch import Kernels, kernels_for
from tests.rows_kit import (
    CHOICES,
    SHAPES,
    Projected,
    check_add_rms_norm,
    check_choose,
    check_norm_rope_write,
    check_rms_norm,
    check_silu_mul,
)

try:
    import triton
except ImportError:
    triton = None


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "triton" and (triton is None or os.environ.get("TRITON_INTERPRET") != "1"):
        pytest.skip("no Triton interpreter here: without Triton, or tests/gpu runs these compiled")
    return kernels_for("cpu", request.param)


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 96), (3, 3000), (0, 64)])
def test_rms_norm(kernels: Kernels, rows: int, size: int) -> None:
    check_rms_norm(kernels, rows, size, torch.float32)


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (5, 96), (3, 3000), (0, 64)])
def test_add_rms_norm(kernels: Kernels, rows: int, size: int) -> None:
    check_add_rms_norm(kernels, rows, size, torch.float32)


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (4, 1500), (0, 8)])
def test_silu_mul(kernels: Kernels, rows: int, size: int) -> None:
    check_silu_mul(kernels, rows, size, torch.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_rope_write(kernels: Kernels, shape: Projected) -> None:
    check_norm_rope_write(kernels, shape, torch.float32)


@pytest.mark.parametrize(("rows", "vocab"), CHOICES)
def test_choose(kernels: Kernels, rows: int, vocab: int) -> None:
    check_choose(kernels, rows, vocab, torch.float32)


def test_choose_takes_the_first_of_equals(kernels: Kernels) -> None:
    logits = torch.zeros(3, 5000)
    logits[0, 4000] = logits[0, 4999] = 1.0
    logits[1, 17] = logits[1, 3000] = 2.0
    tokens, finite = torch.empty(2, 3, dtype=torch.int64)
    kernels.choose(logits, torch.zeros(3), torch.zeros(3, dtype=torch.int64), tokens, finite)
    assert tokens.tolist() == [4000, 17, 0]
    assert finite.tolist() == [1, 1, 1]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_choose_reports_logits_that_are_not_finite(kernels: Kernels, temperature: float) -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1))
    logits[0, 2999] = torch.nan
    logits[1, 5] = torch.inf
    logits[2] = -torch.inf
    logits[3, 7] = -torch.inf  # a masked token is no error
    tokens, finite = torch.empty(2, 5, dtype=torch.int64)
    starts = torch.arange(5)
    kernels.choose(logits, torch.full((5,), temperature), starts, tokens, finite)
    assert finite.tolist() == [0, 0, 0, 1, 1]
    assert ((tokens >= 0) & (tokens < 3000)).all()


def test_noise_is_the_documented_hash() -> None:
    """SplitMix64 written out in Python's integers."""
    mask = (1 << 64) - 1
    start = noise.stream_start(2**64 - 1, 7)
    expected = []
    for token in (0, 1, 151_935):
        bits = (start + (token + 1) * noise.WEYL) & mask
        bits = ((bits ^ bits >> 30) * noise.MIX_A) & mask
        bits = ((bits ^ bits >> 27) * noise.MIX_B) & mask
        bits ^= bits >> 31
        expected.append(((bits >> 12) + 0.5) * 2.0**-52)
    assert noise.uniform(start, torch.tensor([0, 1, 151_935])).tolist() == expected


def test_the_sum_may_replace_what_it_was_added_to() -> None:
    """The contract that lets Triton save a pass; the reference leaves its input alone."""
    hidden, delta = torch.ones(1, 8), torch.ones(1, 8)
    total, _ = reference_rows.add_rms_norm(hidden, delta, torch.ones(8), 1e-6)
    assert total.tolist() == [[2.0] * 8]


def test_operands_that_do_not_fit_are_refused() -> None:
    pytest.importorskip("triton")
    from baton.kernels import rows, sampling

    with pytest.raises(ConfigError, match="rows of up to 32768"):
        rows.rms_norm(torch.ones(1, 40_000), torch.ones(40_000), 1e-6)
    with pytest.raises(InternalError, match="cannot be added"):
        rows.add_rms_norm(torch.ones(2, 8), torch.ones(1, 8), torch.ones(8), 1e-6)
    pool = torch.zeros(2, 1, 2, 2, 16, 8)
    rotation, slots = torch.ones(2, 1, 1, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(InternalError, match="do not fit the KV pool"):
        rows.norm_rope_write(torch.ones(1, 8, 6), None, 0.0, rotation, pool, 0, slots)
    with pytest.raises(InternalError, match="is not of 2 tokens"):
        rows.norm_rope_write(torch.ones(2, 8, 8), None, 0.0, rotation, pool, 0, slots)
    with pytest.raises(InternalError, match="do not fit 2 rows"):
        sampling.choose(torch.ones(2, 9), torch.ones(1), slots, slots, slots)
