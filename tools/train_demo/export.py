"""The model directory, as Hugging Face's libraries read it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .network import Decoder, Shape
from .tokenizer import ASSISTANT, END, END_OF_TEXT, SYSTEM, USER

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def export_tokenizer(tokenizer: Tokenizer, shape: Shape, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.max_positions,
        "bos_token": None,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "extra_special_tokens": [USER, ASSISTANT, SYSTEM, END],
        "clean_up_tokenization_spaces": False,
    }
    _replace(directory / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    _replace(directory / "tokenizer_config.json", _json(settings))
    _replace(directory / "chat_template.jinja", CHAT_TEMPLATE.read_bytes())


def export_model(model: Decoder, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bfloat16)."""
    eos = tokenizer.token_to_id(END_OF_TEXT)
    generation = {
        "bos_token_id": eos,
        # A completion ends with the document, a chat answer with the turn.
        "eos_token_id": [eos, tokenizer.token_to_id(END)],
        "pad_token_id": eos,
    }
    tensors = {
        f"model.{name}": weight.detach().bfloat16().contiguous()
        for name, weight in model.state_dict().items()
    }
    _replace(directory / "config.json", _json(_config(model.shape, eos)))
    _replace(directory / "generation_config.json", _json(generation))
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
        save_file(tensors, file.name, metadata={"format": "pt"})
    _rename(file.name, directory / "model.safetensors")


def write_card(text: str, directory: Path) -> None:
    """Writes README.md."""
    _replace(directory / "README.md", text.encode())


def _config(shape: Shape, eos: int | None) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": str(torch.bfloat16).removeprefix("torch."),
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": eos,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    _rename(file.name, path)


def _rename(source: str, target: Path) -> None:
    Path(source).chmod(0o644)
    os.replace(source, target)  # noqa: PTH105 - the atomic rename is the point
