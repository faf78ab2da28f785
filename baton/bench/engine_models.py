"""Random weights of well-known shapes, so that an engine can be measured without a download.

A directory like any other model's, without a tokenizer: config.json and one safetensors file
(https://github.com/huggingface/safetensors, "Format"), which everything that loads models can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from baton.errors import ConfigError
from baton.model.checkpoint import SINGLE_FILE

_PATTERN_VALUES = (1 << 24) + 333
"""Random values that all matrices repeat; the odd number keeps rows of one matrix different."""

Values = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Shape:
    """A Qwen3 decoder (dense, no biases, QK norm) in bfloat16."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool
    max_len: int = 40_960

    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_len,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "attention_bias": False,
            "use_sliding_window": False,
            "tie_word_embeddings": self.tied,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for name, shape in self._layer():
                yield f"model.layers.{layer}.{name}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "input_layernorm", (self.hidden,)
        yield "self_attn.q_proj", (queries, self.hidden)
        yield "self_attn.k_proj", (keys, self.hidden)
        yield "self_attn.v_proj", (keys, self.hidden)
        yield "self_attn.q_norm", (self.head_dim,)
        yield "self_attn.k_norm", (self.head_dim,)
        yield "self_attn.o_proj", (self.hidden, queries)
        yield "post_attention_layernorm", (self.hidden,)
        yield "mlp.gate_proj", (self.mlp, self.hidden)
        yield "mlp.up_proj", (self.mlp, self.hidden)
        yield "mlp.down_proj", (self.hidden, self.mlp)


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(128, 2, 4, 2, 32, 256, 1024, tied=True),
    "small": Shape(512, 8, 8, 2, 64, 1536, 8192, tied=False, max_len=32_768),
    "qwen3-0.6b": Shape(1024, 28, 16, 8, 128, 3072, 151_936, tied=True),
    "qwen3-8b": Shape(4096, 36, 32, 8, 128, 12_288, 151_936, tied=False),
}


def shape_named(name: str) -> Shape:
    """Raises ConfigError for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise ConfigError(f"--shape must be one of {', '.join(SHAPES)}, not {name!r}")
    return SHAPES[name]


def write_random_model(shape: Shape, directory: Path) -> Path:
    """Write the model to `directory`, which must exist, and return it. The same shape gives the
    same bytes. Takes as much disk as the weights have bytes (qwen3-8b: 16 GB)."""
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    tensors = [(name, extent, int(np.prod(extent))) for name, extent in shape.tensors()]
    header: dict[str, object] = {}
    offset = 0
    for name, extent, values in tensors:
        header[name] = {
            "dtype": "BF16",
            "shape": extent,
            "data_offsets": [offset, offset + 2 * values],
        }
        offset += 2 * values
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    pattern = _pattern(min(_PATTERN_VALUES, max(values for _, _, values in tensors)))
    with (directory / SINGLE_FILE).open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = 0
        for name, _, values in tensors:
            if name.endswith("norm.weight"):
                file.write(_bfloat16(np.ones(values, np.float32)).tobytes())
                continue
            for part in _cyclic(pattern, start, values):
                file.write(part.tobytes())
            start = (start + values) % len(pattern)
    return directory


def _cyclic(pattern: Values, start: int, count: int) -> Iterator[Values]:
    """`count` values of the repeated pattern from `start` on, in contiguous parts."""
    while count:
        part = pattern[start : start + count]
        yield part
        count -= len(part)
        start = 0


def _pattern(count: int) -> Values:
    """Normal values of standard deviation 0.02, as models are initialised."""
    return _bfloat16(np.random.default_rng(0).standard_normal(count, np.float32) * 0.02)


def _bfloat16(values: npt.NDArray[np.float32]) -> Values:
    """The upper halves of float32 bits: rounded toward zero, which random weights may be."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
