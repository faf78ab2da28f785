"""One decoder for every family served: the forward pass over a flattened batch of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from baton.kernels.dispatch import Kernels
from baton.model.layers import DecoderWeights, Heads, linear, mix, project_qkv, rms_norm
from baton.model.rope import rope_table
from baton.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DecoderInput:
    """One step's tokens, decodes first, then prefill chunks, with where their KV lives.

    Rows [0, num_decodes) are one token each; row `num_decodes + i` on belong to the chunks, chunk
    `c` from `num_decodes + query_start[c]` to `num_decodes + query_start[c + 1]`.
    """

    tokens: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64, in each token's own sequence
    slots: torch.Tensor  # [tokens] int64: block * block_size + offset
    num_decodes: int
    decode_tables: torch.Tensor  # [num_decodes, max_blocks] int32
    decode_lens: torch.Tensor  # [num_decodes] int32, the current token included
    prefill_tables: torch.Tensor  # [chunks, max_blocks] int32
    query_start: torch.Tensor  # [chunks + 1] int32
    context_lens: torch.Tensor  # [chunks] int32, tokens before the chunk
    sample_rows: torch.Tensor  # [rows] int64: tokens whose logits are wanted


class Decoder:
    """Weights, tables and kernels of a model on one device. Immutable once made.

    `kv` is the pool `[num_blocks, num_layers, 2, kv_heads, block_size, head_dim]`.
    """

    def __init__(
        self, spec: ModelSpec, weights: DecoderWeights, kernels: Kernels, device: str
    ) -> None:
        self._spec = spec
        self._weights = weights
        self._kernels = kernels
        self._heads = Heads(spec.heads, spec.kv_heads, spec.head_dim, spec.rms_norm_eps)
        self._scale = spec.head_dim**-0.5
        self._rope = rope_table(spec.rope, spec.head_dim, spec.max_model_len, device)

    def forward(
        self,
        batch: DecoderInput,
        kv: torch.Tensor,
        on_written: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Write the KV of every token to the pool; return logits `[rows, vocab]` float32 of
        `batch.sample_rows`.

        `on_written(layers)` is called after the KV of layers [0, layers) has been written (on CUDA:
        has been queued).
        """
        cos, sin = self._rope[:, batch.positions, None]
        hidden = functional.embedding(batch.tokens, self._weights.embedding)
        last = self._spec.num_layers - 1
        for index, layer in enumerate(self._weights.layers):
            q, k, v = project_qkv(hidden, layer, self._heads, cos, sin)
            self._kernels.kv_write(k, v, kv, index, batch.slots)
            if on_written is not None:
                on_written(index + 1)
            if index == last and not len(batch.sample_rows):
                break  # only the KV was wanted
            attended = self._attend(q, kv, index, batch)
            if index == last:
                # Nothing reads the other rows any more.
                hidden, attended = hidden[batch.sample_rows], attended[batch.sample_rows]
            hidden = mix(hidden, attended, layer, self._heads.eps)
        if not len(batch.sample_rows):
            return hidden.new_empty((0, self._spec.vocab_size), dtype=torch.float32)
        hidden = rms_norm(hidden, self._weights.norm, self._heads.eps)
        return linear(hidden, self._weights.lm_head).float()

    def _attend(
        self, q: torch.Tensor, kv: torch.Tensor, index: int, batch: DecoderInput
    ) -> torch.Tensor:
        """Attention of all rows, `[tokens, heads, head_dim]`."""
        window, decodes = self._spec.windows[index], batch.num_decodes
        parts = []
        if decodes:
            parts.append(
                self._kernels.attention_decode(
                    q[:decodes],
                    kv,
                    index,
                    batch.decode_tables,
                    batch.decode_lens,
                    self._scale,
                    window,
                )
            )
        if decodes < len(q):
            parts.append(
                self._kernels.attention_prefill(
                    q[decodes:],
                    kv,
                    index,
                    batch.prefill_tables,
                    batch.query_start,
                    batch.context_lens,
                    self._scale,
                    window,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
