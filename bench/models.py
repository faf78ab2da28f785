"""Model directories with random weights, for measurements that need a shape and not a meaning.

A directory holds config.json, generation_config.json, a word-level tokenizer and bfloat16 weights,
all from a fixed seed, so two machines measure the same model. `python -m bench.models small
--dir DIR` makes one and prints its path.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.shapes import EOS_ID, PAD_ID, SHAPES, SPECIAL, Shape, word

FORMAT = 1  # goes up when the same shape would give other files
_SHARD_BYTES = 2 << 30


def ensure_model(name: str, root: Path) -> Path:
    """The directory of the model `name` below `root`; made if it is not there yet.

    Raises KeyError for a name that is not in SHAPES.
    """
    shape = SHAPES[name]
    stamp = json.dumps({"format": FORMAT, **asdict(shape)}, sort_keys=True)
    path = root / name
    if (path / "shape.json").is_file() and (path / "shape.json").read_text() == stamp:
        return path
    # Complete under another name first: an interrupted run leaves nothing that looks whole.
    partial = root / f".{name}.{os.getpid()}"
    partial.mkdir(parents=True, exist_ok=True)
    try:
        write_model(shape, partial)
        (partial / "shape.json").write_text(stamp)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def write_model(shape: Shape, path: Path) -> None:
    """Write every file of the model into the directory `path`."""
    _write_json(path / "config.json", _config(shape))
    _write_json(path / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    _write_json(path / "tokenizer.json", _tokenizer(shape.vocab))
    _write_json(path / "tokenizer_config.json", _tokenizer_config(shape))
    _write_weights(shape, path)


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_position,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "hidden_act": "silu",
        "eos_token_id": EOS_ID,
        "torch_dtype": "bfloat16",
    }


def _tokenizer(vocab: int) -> dict[str, object]:
    """One word per token: every id decodes to whole characters, so no server holds text back, and a
    server that takes only text can be given exactly the tokens that the others get."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": id_,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, id_ in SPECIAL.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word(token): token for token in range(vocab)},
            "unk_token": "<|unk|>",
        },
    }


def _tokenizer_config(shape: Shape) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_position,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "unk_token": "<|unk|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
    }


def weights(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and bfloat16 tensors in the order of the layers, the same for the same shape.

    Matrices are normal with variance 1 / fan-in, so that activations keep their size and logits
    spread over several units. The row of the end-of-sequence token is zero: its logit is 0 and no
    greedy answer ends early, also in a server that does not know `ignore_eos`.
    """
    generator = torch.Generator().manual_seed(1234)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
        return (drawn * (gain / math.sqrt(columns))).to(torch.bfloat16)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    embedding = matrix(shape.vocab, shape.hidden, gain=2.0)
    embedding[EOS_ID] = 0
    yield "model.embed_tokens.weight", embedding
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", ones(shape.hidden)
        yield f"{at}.self_attn.q_proj.weight", matrix(queries, shape.hidden)
        yield f"{at}.self_attn.k_proj.weight", matrix(keys, shape.hidden)
        yield f"{at}.self_attn.v_proj.weight", matrix(keys, shape.hidden)
        yield f"{at}.self_attn.o_proj.weight", matrix(shape.hidden, queries)
        yield f"{at}.self_attn.q_norm.weight", ones(shape.head_dim)
        yield f"{at}.self_attn.k_norm.weight", ones(shape.head_dim)
        yield f"{at}.post_attention_layernorm.weight", ones(shape.hidden)
        yield f"{at}.mlp.gate_proj.weight", matrix(shape.intermediate, shape.hidden)
        yield f"{at}.mlp.up_proj.weight", matrix(shape.intermediate, shape.hidden)
        yield f"{at}.mlp.down_proj.weight", matrix(shape.hidden, shape.intermediate)
    yield "model.norm.weight", ones(shape.hidden)
    if not shape.tied:
        head = matrix(shape.vocab, shape.hidden, gain=2.0)
        head[EOS_ID] = 0
        yield "lm_head.weight", head


def _write_weights(shape: Shape, path: Path) -> None:
    """One file, or shards with an index when the weights are large."""
    shards: list[list[str]] = []
    total = 0
    batch: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(batch, path / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in weights(shape):
        batch[name] = tensor
        total += tensor.nbytes
        if sum(kept.nbytes for kept in batch.values()) >= _SHARD_BYTES:
            flush()
    if batch:
        flush()
    if len(shards) == 1:
        (path / "shard-0.safetensors").rename(path / "model.safetensors")
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(files):
        (path / f"shard-{i}.safetensors").rename(path / file)
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("--dir", type=Path, required=True, help="the model becomes DIR/NAME")
    options = parser.parse_args()
    sys.stdout.write(f"{ensure_model(options.name, options.dir)}\n")


if __name__ == "__main__":
    main()
