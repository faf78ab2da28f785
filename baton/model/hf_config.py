"""Hugging Face's config.json, in both dialects, read into typed values. No torch.

transformers 5 writes `dtype` and `rope_parameters`; most published models have `torch_dtype`,
`rope_theta` and `rope_scaling`. Anything that would change the answer and is not supported is an
error here, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from baton.errors import ModelLoadError
from baton.model.checkpoint import Checkpoint

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding and how it is stretched beyond the trained length.

    linear: positions divided by `factor`. llama3: Llama 3.1's frequency bands. yarn: YaRN
    (arXiv:2309.00071); `attention_factor` None means derived from `factor`, `mscale` and
    `mscale_all_dim`.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_max_len: int = 0  # llama3, yarn: trained context, tokens
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float = 0.0  # yarn; 0 = not given
    mscale_all_dim: float = 0.0  # yarn; 0 = not given
    truncate: bool = True  # yarn: round the correction range to whole dimensions


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture fixes without saying so in config.json."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    default_head_dim: int = 0  # 0 = hidden_size / heads
    default_kv_heads: int = 0  # 0 = as many as heads
    sliding: Literal["never", "always", "opt_in"] = "never"
    default_window: int = 0


FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", reads_attention_bias=True, reads_mlp_bias=True),
        Family("MistralForCausalLM", default_kv_heads=8, sliding="always", default_window=4096),
        Family("Qwen2ForCausalLM", qkv_bias=True, sliding="opt_in", default_window=4096),
        Family(
            "Qwen3ForCausalLM",
            qk_norm=True,
            reads_attention_bias=True,
            default_head_dim=128,
            sliding="opt_in",
            default_window=4096,
        ),
    )
}

_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class HfConfig:
    """A JSON object of a model directory, with readers that name the file in their errors."""

    path: Path
    values: Mapping[str, Any]

    def error(self, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {problem}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer. Raises ModelLoadError when it is absent without a default."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(f"{key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{key} must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {value!r}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Absent, one id or a list of ids."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise self.error(f"{key} must be a token id or a list of them, not {value!r}")
        return tuple(sorted({token for token in ids if token >= 0}))

    def family(self) -> Family:
        """The architecture's flags. Raises ModelLoadError for anything not supported."""
        architectures = self.values.get("architectures") or []
        model_type = str(self.values.get("model_type"))
        name = str(
            architectures[0] if architectures else _BY_MODEL_TYPE.get(model_type, model_type)
        )
        if name not in FAMILIES:
            raise self.error(
                f"architecture {name} is not supported; supported: {', '.join(sorted(FAMILIES))}"
            )
        activation = self.values.get("hidden_act", "silu")
        if activation != "silu":
            raise self.error(f"hidden_act {activation!r} is not supported; supported: silu")
        if self.values.get("quantization_config"):
            raise self.error(
                "quantized weights are not supported; use float32, bfloat16 or float16"
            )
        return FAMILIES[name]

    def dtype(self, checkpoint: Checkpoint) -> Literal["float32", "bfloat16", "float16"]:
        """The weights' type: what config.json says, else what the embedding is stored in."""
        name = self.values.get("dtype") or self.values.get("torch_dtype")
        if name is None:
            entry = checkpoint.tensors.get("model.embed_tokens.weight")
            name = _STORED_DTYPES.get(entry.dtype, entry.dtype) if entry else "float32"
        if name not in _STORED_DTYPES.values():
            raise self.error(
                f"dtype {name!r} is not supported; supported: {', '.join(_STORED_DTYPES.values())}"
            )
        return cast(Literal["float32", "bfloat16", "float16"], name)

    def windows(self, family: Family, num_layers: int) -> tuple[int, ...]:
        """The attention window of each layer; 0 = full attention."""
        if family.sliding == "never" or (
            family.sliding == "opt_in" and not self.flag("use_sliding_window", False)
        ):
            return (0,) * num_layers
        if "sliding_window" in self.values and self.values["sliding_window"] is None:
            return (0,) * num_layers
        window = self.integer("sliding_window", family.default_window)
        layer_types = self.values.get("layer_types")
        if layer_types is None:
            first = self.values.get("max_window_layers", 28) if family.sliding == "opt_in" else 0
            return tuple(window if layer >= first else 0 for layer in range(num_layers))
        known = {"sliding_attention": window, "full_attention": 0}
        if len(layer_types) != num_layers or not set(layer_types) <= set(known):
            raise self.error(
                f"layer_types must name {num_layers} layers, each of {', '.join(sorted(known))}"
            )
        return tuple(known[kind] for kind in layer_types)

    def rope(self) -> RopeSpec:
        """Raises ModelLoadError for scaling that is not supported (dynamic, longrope, ...)."""
        rope = self._rope_parameters()
        kind = rope.values.get("rope_type") or rope.values.get("type") or "default"
        theta = rope.number("rope_theta", self.number("rope_theta", 10_000.0))
        if rope.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0)) != 1.0:
            raise rope.error("partial_rotary_factor other than 1 is not supported")
        original = rope.integer("original_max_position_embeddings", self._trained_len())
        if kind == "default":
            return RopeSpec(theta=theta)
        if kind == "linear":
            return RopeSpec("linear", theta, rope.number("factor"))
        if kind == "llama3":
            return RopeSpec(
                "llama3",
                theta,
                rope.number("factor"),
                original,
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
            )
        if kind == "yarn":
            given = rope.values.get("attention_factor")
            return RopeSpec(
                "yarn",
                theta,
                rope.number("factor", self._trained_len() / original),
                original,
                beta_fast=rope.number("beta_fast", 32.0) or 32.0,
                beta_slow=rope.number("beta_slow", 1.0) or 1.0,
                attention_factor=None if given is None else rope.number("attention_factor"),
                mscale=rope.number("mscale", 0.0),
                mscale_all_dim=rope.number("mscale_all_dim", 0.0),
                truncate=rope.flag("truncate", True),
            )
        raise rope.error(
            f"RoPE scaling {kind!r} is not supported; supported: default, linear, llama3, yarn"
        )

    def max_model_len(self) -> int:
        """The longest context in tokens: `max_position_embeddings`, stretched by linear and YaRN
        scaling, whose configs by convention keep the trained length there."""
        rope, trained = self.rope(), self._trained_len()
        if rope.kind == "linear":
            return int(trained * rope.factor)
        if rope.kind == "yarn":
            return max(trained, int(rope.original_max_len * rope.factor))
        return trained

    def _trained_len(self) -> int:
        return self.integer("max_position_embeddings")

    def _rope_parameters(self) -> HfConfig:
        raw = self.values.get("rope_scaling") or self.values.get("rope_parameters") or {}
        if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
            raise self.error(
                "RoPE parameters must be one flat object; one per layer type is not supported"
            )
        if (original := self.values.get("original_max_position_embeddings")) is not None:
            raw = {**raw, "original_max_position_embeddings": original}
        return HfConfig(self.path, raw)
