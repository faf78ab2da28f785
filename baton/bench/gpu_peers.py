"""Decode steps of other engines over the same weights, where they are installed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from baton.bench.engine_device import find_device
from baton.bench.engine_text import Table, time_text

_FEW = 8  # tokens of the shorter of two runs, whose difference is decode steps alone


def transformers_decode(directory: Path, device_name: str, quick: bool) -> Table:
    """`generate` with its default cache and attention."""
    from transformers import AutoModelForCausalLM

    device = find_device(device_name, 0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = model.to(device.name).eval()

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts, device=device.name)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        device.sync()

    return _decode("transformers", generate, model.config.vocab_size, quick)


def vllm_decode(directory: Path, quick: bool) -> Table:
    """vLLM's offline engine with its defaults, prefix caching aside."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine: Any = LLM(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=4096,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], tokens: int) -> None:
        engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )

    vocab_size: int = engine.llm_engine.model_config.get_vocab_size()
    return _decode("vLLM", generate, vocab_size, quick)


def _decode(
    name: str, generate: Callable[[list[list[int]], int], None], vocab_size: int, quick: bool
) -> Table:
    """Time of one decode step: of `tokens` tokens less that of a few, by the tokens between."""
    points = ((1, 16), (2, 16)) if quick else ((1, 1024), (8, 1024), (32, 1024))
    tokens = 16 if quick else 72
    rows = []
    for batch, context in points:
        prompts = [[(number + at) % vocab_size for at in range(context)] for number in range(batch)]
        generate(prompts, _FEW)  # warm
        few, many = (_seconds(generate, prompts, count) for count in (_FEW, tokens))
        step = (many - few) / (tokens - _FEW)
        rate = f"{batch / step:,.0f}" if step > 0 else "lost in noise"
        rows.append((f"decode {batch} x {context}", time_text(max(step, 0.0)), rate))
    return Table(name, ("", "step", "tokens/s"), tuple(rows))


def _seconds(
    generate: Callable[[list[list[int]], int], None], prompts: list[list[int]], tokens: int
) -> float:
    start = time.perf_counter()
    generate(prompts, tokens)
    return time.perf_counter() - start
