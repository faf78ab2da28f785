"""One decoder for every family served: the forward pass over a flattened batch of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from baton.kernels.dispatch import Kernels
from baton.model.layers import DecoderWeights, LayerWeights, linear
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
    sample_rows: torch.Tensor  # [rows] int64: tokens whose logits are wanted, ascending


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
        self._scale = spec.head_dim**-0.5
        self._rope = rope_table(spec.rope, spec.head_dim, spec.max_model_len, device)

    def forward(
        self,
        batch: DecoderInput,
        kv: torch.Tensor,
        on_written: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Write the KV of every token to the pool; return logits `[rows, vocab]` float32 of
        `batch.sample_rows`. `on_written` as in `last_hidden`."""
        return self.logits(self.last_hidden(batch, kv, on_written)).float()

    def logits(self, normed: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits `[rows, vocab]` of what `last_hidden` returned, in the weights' type; into `out`
        if it is given (plain weights only)."""
        if out is not None:
            return torch.mm(normed, self._weights.lm_head.t(), out=out)
        if not len(normed):
            return normed.new_empty((0, self._spec.vocab_size))
        return linear(normed, self._weights.lm_head)

    def last_hidden(
        self,
        batch: DecoderInput,
        kv: torch.Tensor,
        on_written: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Write the KV of every token to the pool; return the normed output of the last layer
        `[rows, hidden]` of `batch.sample_rows`.

        `on_written(layers)` is called after the KV of layers [0, layers) has been written (on CUDA:
        has been queued).
        """
        weights, rows = self._weights, batch.sample_rows
        # After each half of a layer comes the residual, and after that the norm of the next half.
        following = [*(layer.input_norm for layer in weights.layers[1:]), weights.norm]
        rotation = self._rope[:, batch.positions, None]
        hidden = functional.embedding(batch.tokens, weights.embedding)
        normed = self._kernels.rms_norm(
            hidden, weights.layers[0].input_norm, self._spec.rms_norm_eps
        )
        last = self._spec.num_layers - 1
        for index, (layer, next_norm) in enumerate(zip(weights.layers, following, strict=True)):
            q = self._project(normed, layer, rotation, kv, index, batch.slots)
            if on_written is not None:
                on_written(index + 1)
            if index == last and not len(rows):
                return hidden[:0]  # only the KV was wanted
            attended = self._attend(q, kv, index, batch)
            if index == last and len(rows) < len(hidden):
                # Nothing reads the other rows any more.
                hidden, attended = hidden[rows], attended[rows]
            hidden, normed = self._mix(hidden, attended, layer, next_norm)
        return normed

    def _project(
        self,
        normed: torch.Tensor,
        layer: LayerWeights,
        rotation: torch.Tensor,
        kv: torch.Tensor,
        index: int,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """Queries `[tokens, heads, head_dim]`; keys and values go to the pool."""
        qkv = linear(normed, layer.qkv, layer.qkv_bias)
        qkv = qkv.view(len(normed), -1, self._spec.head_dim)
        return self._kernels.norm_rope_write(
            qkv, layer.qk_norm, self._spec.rms_norm_eps, rotation, kv, index, slots
        )

    def _mix(
        self,
        hidden: torch.Tensor,
        attended: torch.Tensor,
        layer: LayerWeights,
        next_norm: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rest of the layer after attention: output projection, residual, gated MLP, residual;
        and the norm that the next layer begins with. All but `attended` are `[tokens, hidden]`."""
        kernels, eps = self._kernels, self._spec.rms_norm_eps
        delta = linear(attended.flatten(1), layer.output, layer.output_bias)
        hidden, normed = kernels.add_rms_norm(hidden, delta, layer.post_norm, eps)
        activated = kernels.silu_mul(linear(normed, layer.gate_up, layer.gate_up_bias))
        delta = linear(activated, layer.down, layer.down_bias)
        return kernels.add_rms_norm(hidden, delta, next_norm, eps)

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
