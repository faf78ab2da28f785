"""Tiny random Hugging Face model directories, made on the spot, one per family and feature.

The weights are large on purpose. At transformers' default initialisation (0.02) the logits of a
tiny model nearly tie, and float32 rounding, which differs with the composition of a batch, decides
the greedy token. Here the best logit leads by about a unit, so that two correct implementations
agree token for token (rounding errors are near 1e-5), and the answer depends on far-away context,
so that misplaced KV shows. tests/unit/test_model_decoder.py checks both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

VOCAB_SIZE = 384
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = SPECIAL_TOKENS.index("<|im_end|>")

logging.disable_progress_bar()

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. def fibonacci(n): return n if n < 2 else "
    "fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Prefill computes the prompt; decode generates the rest. Zwölf Boxkämpfer jagen Viktor.\n",
    "import asyncio\n\nasync def main() -> None:\n    await asyncio.sleep(0)\n",
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "bos_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
    "eos_token_id": EOS_TOKEN_ID,
    "rms_norm_eps": 1e-5,
}

# name -> (model_type, what the config says beyond _BASE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": (
        "llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 48}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2},
    ),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 576,
            },
        },
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3-untied": ("qwen3", {"attention_bias": True}),
}


def make_tiny_model(
    family: str,
    path: Path,
    *,
    dtype: str = "float32",
    max_len: int = 2304,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (a key of FAMILIES) with a tokenizer to `path`; return it.

    The same arguments give the same weights. `overrides` are config.json fields; a small
    `max_shard_size` ("200KB") gives a sharded checkpoint.
    """
    model_type, features = FAMILIES[family]
    settings = {**_BASE, "max_position_embeddings": max_len, **features, **overrides}
    if settings.get("rope_parameters", {}).get("rope_type") == "linear":
        settings["max_position_embeddings"] = int(max_len / settings["rope_parameters"]["factor"])
    if model_type == "qwen2":  # has no such field: it divides
        settings.pop("head_dim", None)
    config = CONFIG_MAPPING[model_type](**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model, seed)
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=settings["bos_token_id"],
        eos_token_id=settings["eos_token_id"],
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
    )
    model.save_pretrained(path, max_shard_size=max_shard_size)
    make_tokenizer(path)
    return path


def make_tokenizer(path: Path) -> None:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens with a chat template, in HF's files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(path)


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Every parameter, biases and norms included: zeros and ones would hide mistakes in them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(0.125 * noise)  # 1 / sqrt(hidden): unit gain
