"""Loading weights: sharded or not, converted, and every way in which files can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.errors import ModelLoadError
from baton.model.checkpoint import read_checkpoint
from baton.model.layers import DecoderWeights
from baton.model.spec import load_spec
from baton.model.weights import load_weights
from tests.models import make_tiny_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load(path: Path, dtype: str = "float32") -> DecoderWeights:
    return load_weights(load_spec(path), path, dtype, "cpu")


def sharded(path: Path) -> list[Path]:
    """A model in several shards; returns them."""
    make_tiny_model("qwen3", path, max_shard_size="200KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) >= 3
    return shards


def rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a safetensors file; None removes one."""
    tensors = {**load_file(path), **changes}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


def refusal(path: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path)
    return caught.value.message


def test_shards_and_single_file_load_the_same(tmp_path: Path) -> None:
    make_tiny_model("qwen3", tmp_path / "single")
    sharded(tmp_path / "sharded")
    single, several = load(tmp_path / "single"), load(tmp_path / "sharded")
    assert torch.equal(single.embedding, several.embedding)
    assert single.lm_head is single.embedding
    for mine, theirs in zip(single.layers, several.layers, strict=True):
        assert torch.equal(mine.qkv, theirs.qkv)
        assert torch.equal(mine.down, theirs.down)


def test_projections_are_fused_in_order(tmp_path: Path) -> None:
    make_tiny_model("qwen3-untied", tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    weights = load(tmp_path)
    layer, prefix = weights.layers[2], "model.layers.2"
    attention = [tensors[f"{prefix}.self_attn.{n}_proj.weight"] for n in "qkv"]
    biases = [tensors[f"{prefix}.self_attn.{n}_proj.bias"] for n in "qkv"]
    gated = [tensors[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
    assert torch.equal(layer.qkv, torch.cat(attention))
    assert layer.qkv_bias is not None
    assert torch.equal(layer.qkv_bias, torch.cat(biases))
    assert torch.equal(layer.gate_up, torch.cat(gated))
    assert layer.qk_norm is not None
    norms = [tensors[f"{prefix}.self_attn.{n}_norm.weight"] for n in "qk"]
    assert torch.equal(layer.qk_norm, torch.stack([norms[0]] * 4 + [norms[1]] * 2))
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_weights_are_converted(stored: str, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path, dtype=stored)
    tensors = load_file(tmp_path / SINGLE)
    assert torch.equal(load(tmp_path).embedding, tensors["model.embed_tokens.weight"].float())
    narrow = load(tmp_path, "bfloat16").layers[0].down
    assert torch.equal(narrow, tensors["model.layers.0.mlp.down_proj.weight"].bfloat16())


def test_leftovers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    make_tiny_model("qwen3", tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "lm_head.weight": torch.zeros(1),  # tied: never read
    }
    rewrite(tmp_path / SINGLE, **extra)
    assert load(tmp_path).lm_head.shape == (384, 64)


def test_no_weights(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    (tmp_path / SINGLE).unlink()
    assert f"no weights in {tmp_path}" in refusal(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    shard = sharded(tmp_path)[1]
    shard.unlink()
    assert f"shard {shard} is missing" in refusal(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1000])
def test_truncated_shard(keep: int, tmp_path: Path) -> None:
    shard = sharded(tmp_path)[2]
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refusal(tmp_path)
    assert str(shard) in message
    assert "truncated" in message


def test_not_a_safetensors_file(tmp_path: Path) -> None:
    shard = sharded(tmp_path)[0]
    shard.write_bytes((12).to_bytes(8, "little") + b"not json at all")
    assert f"{shard} has a broken safetensors header" in refusal(tmp_path)
    shard.write_bytes(b"<html>not found</html>" * 100)
    assert str(shard) in refusal(tmp_path)


def test_header_that_contradicts_itself(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelLoadError, match="size of tensor x"):
        read_checkpoint(tmp_path)


def test_index_that_contradicts_the_shards(tmp_path: Path) -> None:
    first, second, *_ = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    moved = next(name for name, file in index["weight_map"].items() if file == first.name)
    index["weight_map"][moved] = second.name
    (tmp_path / INDEX).write_text(json.dumps(index))
    message = refusal(tmp_path)
    assert f"{second} does not match {INDEX}" in message
    assert moved in message
    assert first.name in message
    index["weight_map"] = {"model.norm.weight": "../elsewhere.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "outside its directory" in refusal(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    assert f"{tmp_path / INDEX} has no weight_map" in refusal(tmp_path)


def test_tensor_missing_from_its_shard(tmp_path: Path) -> None:
    shards = sharded(tmp_path)
    name = next(iter(load_file(shards[1])))
    rewrite(shards[1], **{name: None})
    message = refusal(tmp_path)
    assert str(shards[1]) in message
    assert f"tensor {name}" in message


def test_tensor_of_another_shape(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    rewrite(tmp_path / SINGLE, **{name: torch.zeros(8, 64)})
    message = refusal(tmp_path)
    assert f"{tmp_path / SINGLE}: tensor {name} has shape [8, 64]" in message
    assert "calls for [64, 64]" in message


def test_tensor_missing_altogether(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    rewrite(tmp_path / SINGLE, **{"model.norm.weight": None, "lm_head.weight": None})
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "lack 2 tensors" in message
    assert "model.norm.weight" in message


def test_tensor_that_nobody_asked_for(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(tmp_path / SINGLE, **{name: torch.ones(64)})
    assert f"{tmp_path / SINGLE} holds tensor {name}" in refusal(tmp_path)


def test_tensor_of_unsupported_type(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    name = "model.norm.weight"
    rewrite(tmp_path / SINGLE, **{name: torch.ones(64, dtype=torch.int8)})
    message = refusal(tmp_path)
    assert f"tensor {name} has dtype I8" in message
    assert "supported: BF16, F16, F32" in message
