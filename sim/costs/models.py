"""The models of the simulator: what a token costs in operations and bytes. No weights, no torch.

Shapes are those of the models' published config.json (Hugging Face: meta-llama/Llama-2-70b-hf,
meta-llama/Meta-Llama-3-70B, meta-llama/Meta-Llama-3-8B, Qwen/Qwen3-8B, Qwen/Qwen3-0.6B); `small` is
that of `baton bench engine --shape small`.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A dense decoder with grouped-query attention and a gated MLP (SwiGLU).

    `weight_width` and `kv_width` are bytes per value: 2 for bfloat16, 1 for FP8. Norms and biases
    are left out of the counts: less than 0.1 % of the parameters of every model below.
    """

    name: str
    num_layers: int
    hidden: int
    num_heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied_embeddings: bool = False
    weight_width: int = 2
    kv_width: int = 2

    @property
    def layer_params(self) -> int:
        """Of one layer: query and output, key and value, and the three matrices of the MLP."""
        attention = 2 * self.hidden * self.head_dim * (self.num_heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def head_params(self) -> int:
        """Of the output head."""
        return self.vocab * self.hidden

    @property
    def params(self) -> int:
        embeddings = 0 if self.tied_embeddings else self.vocab * self.hidden
        return self.num_layers * self.layer_params + self.head_params + embeddings

    @property
    def weight_bytes(self) -> int:
        """That a node holds."""
        return self.params * self.weight_width

    @property
    def step_weight_bytes(self) -> int:
        """That a step reads: everything but the table of embeddings, of which it reads rows."""
        read = self.num_layers * self.layer_params + self.head_params
        return read * self.weight_width

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token, all layers."""
        return 2 * self.num_layers * self.kv_heads * self.head_dim * self.kv_width


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec("llama2-70b", 80, 8192, 64, 8, 128, 28_672, 32_000),
        ModelSpec("llama3-70b", 80, 8192, 64, 8, 128, 28_672, 128_256),
        ModelSpec("llama3-8b", 32, 4096, 32, 8, 128, 14_336, 128_256),
        ModelSpec("qwen3-8b", 36, 4096, 32, 8, 128, 12_288, 151_936),
        ModelSpec("qwen3-0.6b", 28, 1024, 16, 8, 128, 3072, 151_936, tied_embeddings=True),
        ModelSpec("small", 8, 512, 8, 2, 64, 1536, 8192),
    )
}


def model_named(name: str) -> ModelSpec:
    """Raises ConfigError that lists the names there are."""
    if name not in MODELS:
        raise ConfigError(f"no model {name!r} in the simulator; there are {', '.join(MODELS)}")
    return MODELS[name]
