"""Rotary position embedding (arXiv:2104.09864) with the scaling variants of the families served."""

from __future__ import annotations

import math

import torch

from baton.model.hf_config import RopeSpec


def rope_table(rope: RopeSpec, head_dim: int, max_len: int, device: str) -> torch.Tensor:
    """Cosines and sines of every position, `[2, max_len, head_dim / 2]` float32.

    YaRN's attention factor is multiplied in, as transformers does.
    """
    frequencies = inverse_frequencies(rope, head_dim)
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * frequencies
    table = torch.stack((angles.cos(), angles.sin())) * attention_factor(rope)
    return table.to(device)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """Radians per position of each pair of dimensions, `[head_dim / 2]` float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, frequencies)
    return frequencies


def attention_factor(rope: RopeSpec) -> float:
    """What cosines and sines are multiplied by (YaRN, section 3.4, "attention temperature")."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(rope: RopeSpec, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, and in between
    the two are mixed linearly in the number of turns over the trained context."""
    turns = rope.original_max_len * frequencies / (2 * math.pi)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / rope.factor)


def _yarn(rope: RopeSpec, head_dim: int, frequencies: torch.Tensor) -> torch.Tensor:
    """YaRN, section 3.2 ("NTK-by-parts"): pairs that turn often are kept, slow ones stretched."""

    def dimension(turns: float) -> float:
        """Which pair of dimensions turns that often over the trained context."""
        span = rope.original_max_len / (turns * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    stretch = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
    stretch = stretch.clamp(0.0, 1.0)
    return frequencies / rope.factor * stretch + frequencies * (1.0 - stretch)
