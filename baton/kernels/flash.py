"""Prefill attention by torch's own FlashAttention over the paged pool, where it can read that.

It is selected by the kernels' name "flash". Whether it is faster than the Triton kernel depends on
the GPU (`python -m tools.tune_kernels --compare` says); its results may change with the batch in
the last bits.
"""

from __future__ import annotations

import importlib.util

import torch

from baton.errors import ConfigError
from baton.kernels.jit import check_operands, require_triton


def require_flash(device: str) -> None:
    """Raise ConfigError unless this torch has FlashAttention over paged KV, and a GPU for it."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        raise ConfigError(
            f"the kernels 'flash' need torch 2.13 or newer, and this is {torch.__version__}; "
            "choose 'triton'"
        )
    if not device.startswith("cuda"):
        raise ConfigError(f"the kernels 'flash' need a CUDA GPU, and the device is {device!r}")
    require_triton(device)


def attention_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """As `baton.kernels.reference.attention_prefill`, without waiting for the GPU."""
    from torch.nn.attention.varlen import varlen_attn

    q = check_operands(q, kv)
    if len(q) == 0:
        return torch.empty_like(q)
    pages = kv[:, layer].transpose(2, 3)  # [num_blocks, 2, block_size, kv_heads, head_dim]
    longest = block_tables.shape[1] * kv.shape[4]
    attended = varlen_attn(
        q,
        pages[:, 0],
        pages[:, 1],
        query_start,
        None,
        # Bounds suffice; the exact lengths are on the GPU.
        min(len(q), longest),
        longest,
        scale=scale,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=True,
        seqused_k=context_lens + query_start.diff(),
        block_table=block_tables,
        num_splits=1,
    )
    assert isinstance(attended, torch.Tensor)  # a pair only when asked for
    return attended
