"""The weights of a decoder as plain frozen values, and their product with rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Matrices are `[out, in]`; those that read the same input are one matrix,
    plain or packed.

    `qkv` `[(heads + 2 * kv_heads) * head_dim, hidden]`: queries, then keys, then values.
    `qk_norm` `[heads + kv_heads, head_dim]`: each head's row of the query or key norm.
    `gate_up` `[2 * intermediate, hidden]`: gate, then up. None where the family has none.
    """

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """`lm_head` is `embedding` itself where the model ties them."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    lm_head: torch.Tensor  # [vocab, hidden]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for a plain or a packed weight (see `baton.model.packing`)."""
    if not weight.is_mkldnn:
        return functional.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
