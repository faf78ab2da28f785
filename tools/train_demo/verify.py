"""Checks an exported directory against transformers' own Qwen3."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from .network import Decoder, Shape

TOLERANCE = 2e-3
TEXT = "def fibonacci(n):\n    if n < 2:\n        return n  # né\n<|end|><|user|>Hi<|end|>"


def verify_export(directory: Path) -> float:
    """The largest difference of a logit in float32; raises ValueError where it is too large."""
    plain = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(TEXT).ids
    wrapped = AutoTokenizer.from_pretrained(directory).encode(TEXT, add_special_tokens=False)
    if plain != wrapped:
        raise ValueError("transformers tokenizes differently from tokenizer.json")
    ids = torch.tensor([plain])
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(ids).logits
        ours = _load(directory)(ids)
    difference = float((ours - theirs).abs().max())
    if difference > TOLERANCE:
        raise ValueError(f"logits differ from transformers by up to {difference}")
    return difference


def _load(directory: Path) -> torch.nn.Module:
    model = Decoder(Shape(compute=torch.float32))
    tensors = load_file(directory / "model.safetensors")
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in tensors.items()})
    return _WithOutput(model)


class _WithOutput(torch.nn.Module):
    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self._model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, tokens, vocab]."""
        states: torch.Tensor = self._model(ids)
        return states @ self._model.embed_tokens.weight.T
