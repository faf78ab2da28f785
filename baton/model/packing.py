"""Weights in the order in which the CPU's matrix units read them.

oneDNN multiplies bfloat16 by tiles; of a plain `[out, in]` matrix it makes a reordered copy for
every product, which costs a decode step, where each weight is used once, more than the product.
Packed once, the same kernels give the same bits from 1.3 to 2 times as fast.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from baton.model.layers import DecoderWeights, LayerWeights

_MATRICES = ("qkv", "output", "gate_up", "down")
_BATCH = 32
"""Rows that the order is chosen for; it was the best or near it from 1 to 512 rows."""


def pack(weights: DecoderWeights) -> DecoderWeights:
    """`weights` with packed matrices where the device multiplies those faster, else `weights`.

    Takes the plain matrices away, one by one, so that the peak is one matrix above the total (and
    a tied embedding, which is also looked up by rows, stays beside its packed copy).
    """
    if not _packable(weights.lm_head):
        return weights
    tied = weights.lm_head is weights.embedding
    return replace(
        weights,
        layers=tuple(_pack_layer(layer) for layer in weights.layers),
        lm_head=_packed(weights.lm_head) if tied else _moved(weights.lm_head),
    )


def _packable(matrix: torch.Tensor) -> bool:
    return (
        matrix.device.type == "cpu"
        and matrix.dtype is torch.bfloat16
        and torch._C._has_mkldnn
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _pack_layer(layer: LayerWeights) -> LayerWeights:
    return replace(layer, **{name: _moved(getattr(layer, name)) for name in _MATRICES})


def _moved(matrix: torch.Tensor) -> torch.Tensor:
    packed = _packed(matrix)
    matrix.data = matrix.new_empty(0)  # its memory is given back before the next one is packed
    return packed


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, _BATCH)
    return packed
