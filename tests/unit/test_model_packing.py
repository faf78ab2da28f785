"""Packed weights: the same bits as plain ones, and no plain copy left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.model.layers import DecoderWeights, linear
from baton.model.packing import pack
from baton.model.spec import load_spec
from baton.model.weights import load_weights
from tests.models import make_tiny_model

MATRICES = ("qkv", "output", "gate_up", "down")

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU (or this torch) multiplies no bfloat16 by oneDNN",
)


def load(path: Path, family: str, dtype: str) -> DecoderWeights:
    if not path.exists():
        make_tiny_model(family, path, dtype="bfloat16")
    return load_weights(load_spec(path), path, dtype, "cpu")


@needs_bf16
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_products_are_the_same_bit_for_bit(tmp_path: Path, rows: int) -> None:
    plain = load(tmp_path / "m", "llama-bias", "bfloat16")
    packed = pack(load(tmp_path / "m", "llama-bias", "bfloat16"))
    generator = torch.Generator().manual_seed(rows)
    pairs = [(plain.lm_head, packed.lm_head, None)]
    for a, b in zip(plain.layers, packed.layers, strict=True):
        pairs += [(getattr(a, n), getattr(b, n), getattr(a, f"{n}_bias")) for n in MATRICES]
    with torch.inference_mode():
        for ours, theirs, bias in pairs:
            x = torch.randn(rows, ours.shape[1], generator=generator).bfloat16()
            assert torch.equal(linear(x, ours, bias), linear(x, theirs, bias))


@needs_bf16
def test_plain_matrices_are_given_back(tmp_path: Path) -> None:
    weights = load(tmp_path / "m", "llama", "bfloat16")
    packed = pack(weights)
    assert weights.layers[0].qkv.numel() == weights.lm_head.numel() == 0
    assert packed.layers[0].qkv.is_mkldnn
    assert packed.layers[0].input_norm is weights.layers[0].input_norm


@needs_bf16
def test_a_tied_embedding_can_still_be_looked_up(tmp_path: Path) -> None:
    weights = load(tmp_path / "m", "qwen2", "bfloat16")
    packed = pack(weights)
    assert packed.lm_head.is_mkldnn
    assert packed.embedding is weights.embedding
    assert packed.embedding.numel() > 0


def test_float32_stays_as_it_is(tmp_path: Path) -> None:
    weights = load(tmp_path / "m", "llama", "float32")
    assert pack(weights) is weights
