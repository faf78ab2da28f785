"""What a decoder does to every row by itself, in plain torch: norms, rotation, activation, and the
choice of a token. What the fused Triton kernels are compared with, and what the CPU engine runs.

A result has the type of its input; what is accumulated or exponentiated is in float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from baton.kernels.noise import uniform
from baton.kernels.reference import kv_write


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm of rows `[rows, size]` (arXiv:1910.07467)."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(
    hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden + delta` and its norm, all `[rows, size]`. May overwrite `hidden` with the sum."""
    total = hidden + delta
    return total, rms_norm(total, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of rows `[rows, 2 * size]`, gate first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def norm_rope_write(
    qkv: torch.Tensor,
    qk_norm: torch.Tensor | None,
    eps: float,
    rotation: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    slots: torch.Tensor,
) -> torch.Tensor:
    """From projected rows to queries, and keys and values in the pool.

    `qkv` is `[tokens, heads + 2 * kv_heads, head_dim]`: queries, keys, values. Queries and keys are
    normed by `qk_norm` `[heads + kv_heads, head_dim]` where there is one, and rotated by `rotation`
    `[2, tokens, 1, head_dim / 2]` (cosines, sines; float32, contiguous). `slots` as in `kv_write`.
    Returns the queries `[tokens, heads, head_dim]`, contiguous.
    """
    kv_heads, head_dim = kv.shape[3], kv.shape[5]
    qk, v = torch.split(qkv, [qkv.shape[1] - kv_heads, kv_heads], dim=1)
    if qk_norm is not None:
        qk = functional.rms_norm(qk, (head_dim,), None, eps) * qk_norm
    rotated = apply_rope(qk, rotation[0], rotation[1])
    q, k = torch.split(rotated, [qk.shape[1] - kv_heads, kv_heads], dim=1)
    kv_write(k, v, kv, layer, slots)
    return q.contiguous()


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` `[tokens, heads, head_dim]` by `cos`, `sin` `[tokens, 1, head_dim / 2]`.

    Dimension i pairs with i + head_dim / 2 (arXiv:2104.09864, as in transformers). Computed in
    float32, returned contiguous in x's type.
    """
    halves = x.view(*x.shape[:-1], 2, x.shape[-1] // 2).float()
    rotated = halves * cos.unsqueeze(-2)
    # In place: at prefill sizes, time goes into passes over memory.
    rotated[..., 0, :].addcmul_(halves[..., 1, :], sin, value=-1)
    rotated[..., 1, :].addcmul_(halves[..., 0, :], sin)
    return rotated.flatten(-2).to(x.dtype)


def choose(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    starts: torch.Tensor,
    tokens: torch.Tensor,
    finite: torch.Tensor,
) -> None:
    """Pick a token per row of `logits` `[rows, vocab]`: the best of logit / temperature plus Gumbel
    noise (Maddison, Tarlow and Minka, NeurIPS'14, section 2), or of the logit alone where the
    temperature is 0; the first one on ties.

    `temperatures` `[rows]` are float32, `starts` `[rows]` int64 (`noise.stream_start`). Writes
    `tokens` and `finite` `[rows]`, both int64: `finite` is 0 where a logit is NaN or the best is
    not finite, and the token then is any.
    """
    scores = logits.float()
    best = scores.amax(dim=-1)  # NaN if there is one
    finite.copy_(best.isfinite())
    ids = torch.arange(logits.shape[-1], device=logits.device)
    divisors = torch.where(temperatures > 0, temperatures, 1.0)
    noise = uniform(starts[:, None], ids).log_().neg_().log_()
    noise *= (temperatures > 0)[:, None]
    tokens.copy_((scores / divisors[:, None] - noise).argmax(dim=-1))
