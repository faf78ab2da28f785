"""How one engine is set up. Filled in by the process from its own configuration and the model."""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import ConfigError
from baton.types.fleet import KvLayout


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ConfigError when the values cannot work together."""

    layout: KvLayout  # names what may share KV; block_size and num_layers come from here
    num_blocks: int  # size of the block pool
    max_model_len: int  # tokens of prompt and answer together
    eos_token_ids: tuple[int, ...] = ()
    max_num_seqs: int = 64  # sequences (and reservations) that may hold a place in a step
    max_batch_tokens: int = 2048  # token budget of one step: decodes and prefill chunks
    max_waiting: int = 1024  # sequences and reservations that wait for blocks
    prefix_caching: bool = True
    layer_groups: int = 1  # 1: the KV of a chunk is published at the chunk's end, not on the way

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_model_len", "max_num_seqs", "max_waiting", "layer_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_batch_tokens < self.max_num_seqs:
            # Otherwise some running decodes would get no token in a step, and a step could starve
            # a prefill for ever.
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), so that every running sequence advances in every step."
            )

    @property
    def block_size(self) -> int:
        return self.layout.block_size
