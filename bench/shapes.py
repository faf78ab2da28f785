"""Shapes of the measured models, and what text a token of theirs is. No torch."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_WORD = 16  # ids below are special or unused: prompts do not use them
EOS_ID, PAD_ID, UNK_ID = 0, 1, 2
SPECIAL = {"<|endoftext|>": EOS_ID, "<|pad|>": PAD_ID, "<|unk|>": UNK_ID}


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 decoder: sizes in elements, `max_position` in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_position: int
    tied: bool
    rope_theta: float = 1_000_000.0


SHAPES = {
    "small": Shape(512, 8, 8, 2, 64, 1536, 8192, 32768, tied=False),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151936, 40960, tied=True),
    "qwen3-8b": Shape(4096, 36, 32, 8, 128, 12288, 151936, 40960, tied=False),
}


def word(token: int) -> str:
    """The text of a token; words joined by blanks tokenize to exactly these tokens again."""
    return next((text for text, id_ in SPECIAL.items() if id_ == token), f"w{token}")
