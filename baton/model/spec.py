"""What a model is, as far as serving it is concerned: shapes, flags, limits, identity. No torch.

A `ModelSpec` is read once from a Hugging Face directory and never changes. The decoder is one
program for all families; everything that differs between them is a field here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from baton.errors import ConfigError, ModelLoadError
from baton.model import hf_config
from baton.model.checkpoint import read_checkpoint, read_json
from baton.model.hf_config import RopeSpec
from baton.model.hub import resolve_model
from baton.types.fleet import KvLayout

__all__ = [
    "ModelSpec",
    "RopeSpec",
    "choose_dtype",
    "kv_layout",
    "load_spec",
    "pair_to_token",
    "resolve_model",
]

DTYPES = ("float32", "bfloat16")

# Fields that change neither weights nor KV, so two specs that differ in them are the same model.
_NOT_IDENTITY = frozenset({"fingerprint", "max_model_len", "eos_token_ids"})


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: Llama 2/3, Mistral, Qwen2/2.5 or Qwen3 (dense).

    `windows[layer]` is the sliding attention window in tokens, the current one included; 0 means
    full attention. `fingerprint` (hexadecimal) covers the config and the weights and is equal for
    equal copies on any machine.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_model_len: int  # tokens, prompt and answer together
    rms_norm_eps: float
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool  # RMS norm over each head's query and key before RoPE
    tie_embeddings: bool
    windows: tuple[int, ...]
    rope: RopeSpec
    dtype: Literal["float32", "bfloat16", "float16"]  # of the stored weights
    eos_token_ids: tuple[int, ...]
    fingerprint: str


def load_spec(path: Path) -> ModelSpec:
    """Read config.json, generation_config.json and the headers of the weights.

    Raises ModelLoadError, naming the file, when something is missing, unsupported or broken.
    """
    if not path.is_dir():
        raise ModelLoadError(f"model directory {path} does not exist")
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelLoadError(f"{config_path} is missing: {path} is not a Hugging Face model")
    config = hf_config.HfConfig(config_path, read_json(config_path))
    flags = config.family()
    num_layers, heads = config.integer("num_hidden_layers"), config.integer("num_attention_heads")
    hidden_size = config.integer("hidden_size")
    head_dim = config.integer("head_dim", flags.default_head_dim or hidden_size // heads)
    kv_heads = config.integer("num_key_value_heads", flags.default_kv_heads or heads)
    if heads % kv_heads or head_dim % 2:
        raise config.error(
            f"{heads} heads cannot be shared by {kv_heads} KV heads of size {head_dim}"
        )
    attention_bias = flags.reads_attention_bias and config.flag("attention_bias", False)
    checkpoint = read_checkpoint(path)
    spec = ModelSpec(
        architecture=flags.architecture,
        vocab_size=config.integer("vocab_size"),
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_model_len=config.max_model_len(),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        qkv_bias=flags.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=flags.reads_mlp_bias and config.flag("mlp_bias", False),
        qk_norm=flags.qk_norm,
        tie_embeddings=config.flag("tie_word_embeddings", False),
        windows=config.windows(flags, num_layers),
        rope=config.rope(),
        dtype=config.dtype(checkpoint),
        eos_token_ids=_eos_token_ids(path, config),
        fingerprint="",
    )
    return replace(spec, fingerprint=_fingerprint(spec, checkpoint.identity))


def pair_to_token(spec: ModelSpec) -> float:
    """Operations of attention for a pair of tokens, relative to those of products for a token.

    Layers with a window count with their products only: their pairs do not grow with the prompt.
    """
    attention = 4 * spec.heads * spec.head_dim * spec.windows.count(0)  # QK^T and PV
    projections = 2 * spec.hidden_size * spec.head_dim * (spec.heads + spec.kv_heads)
    mlp = 3 * spec.hidden_size * spec.intermediate_size
    return attention / (2 * spec.num_layers * (projections + mlp))


def kv_layout(spec: ModelSpec, dtype: str, block_size: int) -> KvLayout:
    """The layout of KV blocks for this model. `dtype` as returned by `choose_dtype`.

    Raises ConfigError for a block size that is not a power of two within 16..256.
    """
    if block_size not in (16, 32, 64, 128, 256):
        raise ConfigError(f"block size must be 16, 32, 64, 128 or 256 tokens, not {block_size}")
    return KvLayout(
        model=spec.fingerprint,
        dtype=dtype,
        num_layers=spec.num_layers,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        block_size=block_size,
    )


def choose_dtype(requested: str, spec: ModelSpec, device: str) -> str:
    """What weights, activations and KV are held in: "float32" or "bfloat16".

    "auto" is the model's own type, except that 16-bit models run in float32 on a CPU whose
    bfloat16 products would be emulated. Raises ConfigError for any other name.
    """
    if requested == "auto":
        if spec.dtype == "float32" or (device == "cpu" and not cpu_has_bfloat16()):
            return "float32"
        return "bfloat16"
    if requested not in DTYPES:
        raise ConfigError(f"dtype must be auto, {' or '.join(DTYPES)}, not {requested!r}")
    return requested


@cache
def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16, AMX or Arm BF16)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(text.split())


def _eos_token_ids(path: Path, config: hf_config.HfConfig) -> tuple[int, ...]:
    """As transformers' `generate` does: generation_config.json wins over config.json."""
    generation_path = path / "generation_config.json"
    if generation_path.is_file():
        generation = hf_config.HfConfig(generation_path, read_json(generation_path))
        if ids := generation.token_ids("eos_token_id"):
            return ids
    return config.token_ids("eos_token_id")


def _fingerprint(spec: ModelSpec, weights: str) -> str:
    """Hash of what the KV of a prompt depends on: the parsed config, not its dialect, and the
    weights. 128 bits, hexadecimal."""
    config = {key: value for key, value in asdict(spec).items() if key not in _NOT_IDENTITY}
    canonical = json.dumps({"config": config, "weights": weights}, sort_keys=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()
