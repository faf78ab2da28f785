"""A model's weights, moved into native memory and run there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from baton.errors import InternalError
from baton.model.layers import DecoderWeights, LayerWeights
from baton.model.rope import rope_table
from baton.model.spec import ModelSpec
from baton.native import NativeModel, unavailable, unfit
from baton.native.library import CModelShape, Weight

_LAYER_WEIGHTS = {
    "input_norm": Weight.INPUT_NORM,
    "qkv": Weight.QKV,
    "qkv_bias": Weight.QKV_BIAS,
    "qk_norm": Weight.QK_NORM,
    "output": Weight.OUTPUT,
    "output_bias": Weight.OUTPUT_BIAS,
    "post_norm": Weight.POST_NORM,
    "gate_up": Weight.GATE_UP,
    "gate_up_bias": Weight.GATE_UP_BIAS,
    "down": Weight.DOWN,
    "down_bias": Weight.DOWN_BIAS,
}


def why_not_native(spec: ModelSpec, device: str, dtype: str) -> str | None:
    """Why the model cannot run natively; None if it can."""
    if device != "cpu":
        return f"native operations run on the CPU, not on {device}"
    if dtype != "bfloat16":
        return f"native operations are for bfloat16, not {dtype}"
    return unavailable() or unfit(_shape(spec))


def load_native(
    spec: ModelSpec, weights: DecoderWeights, threads: int, cpus: Sequence[int] = ()
) -> NativeModel:
    """A native model with these weights (bfloat16, on the CPU), which are **emptied**, one by one:
    memory peaks one matrix above the weights' own size. A tied embedding is held once.

    `cpus`: see `NativeModel`. Raises InternalError where `why_not_native` has a reason.
    """
    model = NativeModel(_shape(spec), spec.windows, threads, cpus)
    cos, sin = rope_table(spec.rope, spec.head_dim, spec.max_model_len, "cpu")
    _move(model, Weight.COS, 0, cos)
    _move(model, Weight.SIN, 0, sin)
    for index, layer in enumerate(weights.layers):
        for weight, tensor in _of_layer(layer):
            _move(model, weight, index, tensor)
    _move(model, Weight.NORM, 0, weights.norm)
    if not spec.tie_embeddings:
        _move(model, Weight.EMBEDDING, 0, weights.embedding)
    _move(model, Weight.HEAD, 0, weights.lm_head)
    return model


def _of_layer(layer: LayerWeights) -> Iterator[tuple[Weight, torch.Tensor]]:
    for name, weight in _LAYER_WEIGHTS.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            yield weight, tensor


def _move(model: NativeModel, weight: Weight, layer: int, tensor: torch.Tensor) -> None:
    wanted = torch.float32 if weight in (Weight.COS, Weight.SIN) else torch.bfloat16
    if tensor.dtype is not wanted or not tensor.is_contiguous():
        raise InternalError(f"{weight.name} must be contiguous {wanted}, not {tensor.dtype}")
    model.load(weight, layer, tensor.data_ptr(), tensor.numel())
    tensor.data = tensor.new_empty(0)  # its memory is given back before the next one is packed


def _shape(spec: ModelSpec) -> CModelShape:
    return CModelShape(
        vocab=spec.vocab_size,
        layers=spec.num_layers,
        hidden=spec.hidden_size,
        intermediate=spec.intermediate_size,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        positions=spec.max_model_len,
        eps=spec.rms_norm_eps,
        scale=spec.head_dim**-0.5,
        qkv_bias=spec.qkv_bias,
        output_bias=spec.output_bias,
        mlp_bias=spec.mlp_bias,
        qk_norm=spec.qk_norm,
        tied=spec.tie_embeddings,
    )
