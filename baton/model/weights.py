"""From safetensors files to `DecoderWeights`: checked by header, then streamed tensor by tensor.

Files are mapped, not read: each tensor is copied from the page cache straight to its place in a
fused matrix, converted on the way, so the peak is the weights plus what the kernel caches.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from baton.errors import ModelLoadError
from baton.model.checkpoint import Checkpoint, TensorEntry, read_checkpoint
from baton.model.layers import DecoderWeights, LayerWeights
from baton.model.spec import ModelSpec

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LOADABLE = frozenset({"F32", "F16", "BF16"})
# Left in old checkpoints although it follows from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_weights(spec: ModelSpec, model_dir: Path, dtype: str, device: str) -> DecoderWeights:
    """All weights in `dtype` ("float32" | "bfloat16") on `device`.

    Raises ModelLoadError, naming file and tensor, when one is missing, unexpected, of another
    shape than the config says, or not a 16 or 32 bit float.
    """
    checkpoint = read_checkpoint(model_dir)
    weights = _allocate(spec, TORCH_DTYPES[dtype], torch.device(device))
    targets = dict(_targets(spec, weights))
    _check(spec, model_dir, checkpoint, targets)
    for path in checkpoint.files:
        _copy_shard(path, targets)
    return weights


def _allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Uninitialised weights of the right shapes."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, mlp = spec.hidden_size, spec.intermediate_size
    qk_heads = spec.heads + spec.kv_heads
    qkv = (qk_heads + spec.kv_heads) * spec.head_dim

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=tensor(hidden),
            qkv=tensor(qkv, hidden),
            qkv_bias=tensor(qkv) if spec.qkv_bias else None,
            qk_norm=tensor(qk_heads, spec.head_dim) if spec.qk_norm else None,
            output=tensor(hidden, spec.heads * spec.head_dim),
            output_bias=tensor(hidden) if spec.output_bias else None,
            post_norm=tensor(hidden),
            gate_up=tensor(2 * mlp, hidden),
            gate_up_bias=tensor(2 * mlp) if spec.mlp_bias else None,
            down=tensor(hidden, mlp),
            down_bias=tensor(hidden) if spec.mlp_bias else None,
        )

    embedding = tensor(spec.vocab_size, hidden)
    return DecoderWeights(
        embedding=embedding,
        layers=tuple(layer() for _ in range(spec.num_layers)),
        norm=tensor(hidden),
        lm_head=embedding if spec.tie_embeddings else tensor(spec.vocab_size, hidden),
    )


def _targets(spec: ModelSpec, weights: DecoderWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor name of the checkpoint with the place that it belongs to."""
    yield "model.embed_tokens.weight", weights.embedding
    yield "model.norm.weight", weights.norm
    if not spec.tie_embeddings:
        yield "lm_head.weight", weights.lm_head
    for index, layer in enumerate(weights.layers):
        for name, target in _layer_targets(spec, layer):
            yield f"model.layers.{index}.{name}", target


def _layer_targets(spec: ModelSpec, layer: LayerWeights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "input_layernorm.weight", layer.input_norm
    yield "post_attention_layernorm.weight", layer.post_norm
    yield "self_attn.o_proj.weight", layer.output
    yield "mlp.down_proj.weight", layer.down
    if layer.output_bias is not None:
        yield "self_attn.o_proj.bias", layer.output_bias
    if layer.down_bias is not None:
        yield "mlp.down_proj.bias", layer.down_bias
    kv_rows = spec.kv_heads * spec.head_dim
    rows = [spec.heads * spec.head_dim, kv_rows, kv_rows]
    for kind, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
        if fused is not None:
            for name, part in zip("qkv", torch.split(fused, rows), strict=True):
                yield f"self_attn.{name}_proj.{kind}", part
    for kind, fused in (("weight", layer.gate_up), ("bias", layer.gate_up_bias)):
        if fused is not None:
            for name, part in zip(("gate", "up"), fused.chunk(2), strict=True):
                yield f"mlp.{name}_proj.{kind}", part
    if layer.qk_norm is not None:
        # One [head_dim] vector in the file, copied to the row of every head.
        queries, keys = torch.split(layer.qk_norm, [spec.heads, spec.kv_heads])
        yield "self_attn.q_norm.weight", queries
        yield "self_attn.k_norm.weight", keys


def _file_shape(name: str, target: torch.Tensor) -> tuple[int, ...]:
    """The shape that the file must have: the target's, but for norms that all heads share."""
    return tuple(
        target.shape[1:] if name.endswith(("q_norm.weight", "k_norm.weight")) else target.shape
    )


def _check(
    spec: ModelSpec, model_dir: Path, checkpoint: Checkpoint, targets: dict[str, torch.Tensor]
) -> None:
    missing = [name for name in targets if name not in checkpoint.tensors]
    if missing:
        raise ModelLoadError(
            f"{model_dir}: the weights lack {len(missing)} tensors that config.json calls for, "
            f"first {missing[0]}"
        )
    for name, entry in checkpoint.tensors.items():
        if name in targets:
            _check_entry(name, entry, targets[name])
        elif not (_DERIVED.fullmatch(name) or (name == "lm_head.weight" and spec.tie_embeddings)):
            raise ModelLoadError(
                f"{entry.file} holds tensor {name}, which config.json does not call for"
            )


def _check_entry(name: str, entry: TensorEntry, target: torch.Tensor) -> None:
    expected = _file_shape(name, target)
    if entry.shape != expected:
        raise ModelLoadError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, "
            f"config.json calls for {list(expected)}"
        )
    if entry.dtype not in _LOADABLE:
        raise ModelLoadError(
            f"{entry.file}: tensor {name} has dtype {entry.dtype}; "
            f"supported: {', '.join(sorted(_LOADABLE))}"
        )


def _copy_shard(path: Path, targets: dict[str, torch.Tensor]) -> None:
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if name in targets:
                    targets[name].copy_(shard.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"cannot load {path}: {error}; download it again") from error
