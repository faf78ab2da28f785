"""The Qwen3 architecture, small enough to compile as one graph for CPU training.

Parameter names are those of Hugging Face's checkpoint, so the state dict is the export. Master
weights are float32; matrix products run in `Shape.compute`, by default bfloat16 (AMX on the CPUs
that have it: five times the speed of float32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults are the demo model's."""

    vocab_size: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    max_positions: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    compute: torch.dtype = torch.bfloat16


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale; computes in float32, keeps the input's type."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class Linear(nn.Module):
    """A matrix without bias, float32 at rest, in the type of its input in the product."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    """Grouped-query causal attention with a norm on each query and key head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        std, out_std = _init_std(shape)
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden, queries, std)
        self.k_proj = Linear(shape.hidden, keys, std)
        self.v_proj = Linear(shape.hidden, keys, std)
        self.o_proj = Linear(queries, shape.hidden, out_std)
        self.q_norm = RMSNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [batch, tokens, hidden], `cos` and `sin` [tokens, head_dim]."""
        batch, tokens, _ = x.shape
        s = self.shape
        q = self.q_norm(self.q_proj(x).view(batch, tokens, s.heads, s.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, tokens, s.kv_heads, s.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, s.kv_heads, s.head_dim).transpose(1, 2)
        group = s.heads // s.kv_heads
        k = _rotate(k, cos, sin).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        out = functional.scaled_dot_product_attention(_rotate(q, cos, sin), k, v, is_causal=True)
        merged: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return merged


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        std, out_std = _init_std(shape)
        self.gate_proj = Linear(shape.hidden, shape.intermediate, std)
        self.up_proj = Linear(shape.hidden, shape.intermediate, std)
        self.down_proj = Linear(shape.intermediate, shape.hidden, out_std)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm; returns the states that the tied output matrix reads."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        cos, sin = _rope_table(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` [batch, tokens] to states [batch, tokens, hidden] of `Shape.compute`."""
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(tokens).to(self.shape.compute)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


def token_losses(states: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, [tokens] of float32; 0 where the target is IGNORED.

    `states` [tokens, hidden], `output` [vocab, hidden], `targets` [tokens].
    """
    logits = functional.linear(states, output.to(states.dtype)).float()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


def _init_std(shape: Shape) -> tuple[float, float]:
    """Standard deviations of matrices that read the residual stream, and that write to it."""
    std = shape.hidden**-0.5
    return std, std * (2 * shape.layers) ** -0.5


def _rope_table(shape: Shape) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    angles = torch.outer(torch.arange(shape.max_positions).float(), shape.rope_theta**-exponents)
    doubled = torch.cat([angles, angles], dim=-1)
    return doubled.cos().to(shape.compute), doubled.sin().to(shape.compute)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the split-half form of Hugging Face's checkpoints."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
