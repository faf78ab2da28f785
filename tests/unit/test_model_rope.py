"""Rotary frequencies against transformers' own, for each scaling variant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from baton.kernels.reference_rows import apply_rope
from baton.model.hf_config import HfConfig
from baton.model.rope import attention_factor, inverse_frequencies, rope_table

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VARIANTS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
    LLAMA3,
    {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 512},
    {**YARN, "original_max_position_embeddings": 8192},
    {**YARN, "original_max_position_embeddings": 512, "attention_factor": 1.7},
    {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "truncate": False, "original_max_position_embeddings": 4096},
]


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v['rope_type']}-{len(v)}")
def test_frequencies_match_transformers(variant: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(
        head_dim=head_dim, max_position_embeddings=32768, rope_parameters=dict(variant)
    )
    if variant["rope_type"] == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[variant["rope_type"]](config)
    values = {"max_position_embeddings": 32768, "rope_parameters": variant}
    rope = HfConfig(Path("config.json"), values).rope()
    torch.testing.assert_close(inverse_frequencies(rope, head_dim), expected, rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor)


def test_rotation_matches_transformers() -> None:
    config = LlamaConfig(head_dim=32, rope_parameters=dict(VARIANTS[5]))
    rope = HfConfig(Path("config.json"), json.loads(config.to_json_string())).rope()
    positions = torch.tensor([0, 1, 17, 900])
    q, k = torch.randn(4, 3, 32), torch.randn(4, 2, 32)
    theirs = LlamaRotaryEmbedding(config)(q, positions[None])
    expected = apply_rotary_pos_emb(q, k, theirs[0][0], theirs[1][0])
    cos, sin = rope_table(rope, 32, 1024, "cpu")[:, positions, None]
    torch.testing.assert_close(apply_rope(q, cos, sin), expected[0])
    torch.testing.assert_close(apply_rope(k, cos, sin), expected[1])


def test_rotation_keeps_the_type_and_is_contiguous() -> None:
    x = torch.randn(5, 4, 16, dtype=torch.bfloat16)[:, :3]
    cos, sin = torch.ones(5, 1, 8), torch.zeros(5, 1, 8)
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert rotated.is_contiguous()
    assert torch.equal(rotated, x)
