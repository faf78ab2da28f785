"""The model card, and the samples in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .evaluate import Figure

TEMPLATE = Path(__file__).with_name("card_template.md")
PROMPTS = ("def ", "def fibonacci(n):", "class ")
CHAT = "Write a function that returns the sum of a list of numbers."
SEED = 0


@dataclass(frozen=True)
class Row:
    """One line of the table of held-out figures."""

    name: str
    model: Figure
    unigram: Figure
    uniform: Figure
    tokens: int
    files: int


@dataclass(frozen=True)
class Card:
    """What the card says about a run."""

    rows: Sequence[Row]
    python: str
    parameters: int
    vocab_size: int
    training_tokens: int
    corpus_tokens: dict[str, int]
    steps: int
    minutes: float
    command: str


def render_card(card: Card, model_directory: Path) -> str:
    """The card's Markdown, with samples drawn from the exported model."""
    corpus = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in card.corpus_tokens.items())
    return Template(TEMPLATE.read_text()).substitute(
        python=card.python,
        parameters=f"{card.parameters:,}",
        vocab_size=f"{card.vocab_size:,}",
        training_tokens=f"{card.training_tokens / 1e6:.1f} million",
        corpus=corpus,
        steps=f"{card.steps:,}",
        minutes=f"{card.minutes:.0f}",
        command=card.command,
        figures="\n".join(_row(row) for row in card.rows),
        samples=_samples(model_directory),
    )


def _row(row: Row) -> str:
    figures = " | ".join(
        f"{f.perplexity:,.2f} | {f.bits_per_byte:.3f}"
        for f in (row.model, row.unigram, row.uniform)
    )
    return f"| {row.name} | {row.files} | {row.tokens:,} | {figures} |"


def _samples(directory: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    parts = []
    for prompt in PROMPTS:
        parts.append(_sample(model, tokenizer, prompt, prompt, sampled=False))
        parts.append(_sample(model, tokenizer, prompt, prompt, sampled=True))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHAT}], tokenize=False, add_generation_prompt=True
    )
    parts.append(_sample(model, tokenizer, chat, f"chat: {CHAT}", sampled=False))
    parts.append(_sample(model, tokenizer, chat, f"chat: {CHAT}", sampled=True))
    return "\n\n".join(parts)


def _sample(model: Any, tokenizer: Any, prompt: str, title: str, sampled: bool) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(SEED)
    how: dict[str, Any] = {"do_sample": False}
    if sampled:
        how = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=120, **how)[0]
    is_chat = title != prompt
    begin = inputs["input_ids"].shape[1] if is_chat else 0
    text = tokenizer.decode(out[begin:], skip_special_tokens=True).rstrip()
    label = f"temperature 0.7, top_p 0.9, seed {SEED}" if sampled else "greedy"
    # Fenced as text: a formatter that knows Markdown would rewrite Python.
    return f"`{title}` ({label}):\n\n```text\n{text}\n```"
