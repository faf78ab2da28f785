"""The weights of a decoder as plain frozen values, and the arithmetic of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from baton.model.rope import apply_rope


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


@dataclass(frozen=True, slots=True)
class Heads:
    """How a layer's projections divide into heads."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension (arXiv:1910.07467), float32 inside."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for a plain or a packed weight (see `baton.model.packing`)."""
    if not weight.is_mkldnn:
        return functional.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def project_qkv(
    hidden: torch.Tensor,
    layer: LayerWeights,
    shape: Heads,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[tokens, heads, head_dim]` and keys and values `[tokens, kv_heads, head_dim]`;
    queries and keys normed where the family does, and rotated."""
    normed = rms_norm(hidden, layer.input_norm, shape.eps)
    qkv = linear(normed, layer.qkv, layer.qkv_bias)
    qkv = qkv.view(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    qk, v = torch.split(qkv, [shape.heads + shape.kv_heads, shape.kv_heads], dim=1)
    if layer.qk_norm is not None:
        qk = functional.rms_norm(qk, (shape.head_dim,), None, shape.eps) * layer.qk_norm
    q, k = torch.split(apply_rope(qk, cos, sin), [shape.heads, shape.kv_heads], dim=1)
    return q.contiguous(), k, v


def mix(
    hidden: torch.Tensor, attended: torch.Tensor, layer: LayerWeights, eps: float
) -> torch.Tensor:
    """The rest of the layer after attention: output projection, residual, gated MLP, residual.

    `attended` is `[tokens, heads, head_dim]`; `hidden` and the result are `[tokens, hidden]`.
    """
    hidden = hidden + linear(attended.flatten(1), layer.output, layer.output_bias)
    normed = rms_norm(hidden, layer.post_norm, eps)
    gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return hidden + linear(functional.silu(gate) * up, layer.down, layer.down_bias)
