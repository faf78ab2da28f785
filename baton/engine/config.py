"""How one engine is set up. Filled in by the process from its own configuration and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.errors import ConfigError, InvalidRequest
from baton.types.fleet import KvLayout
from baton.types.request import GenerationTask


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Raises ConfigError when the values cannot work together."""

    layout: KvLayout  # names what may share KV; block_size and num_layers come from here
    num_blocks: int  # size of the block pool
    max_model_len: int  # tokens of prompt and answer together
    eos_token_ids: tuple[int, ...] = ()
    max_num_seqs: int = 64  # sequences (and reservations) that may hold a place in a step
    max_batch_tokens: int = 2048  # token budget of one step: decodes and prefill chunks
    max_prefill_tokens: int | None = None  # of a step that also decodes; None: the whole budget
    prompts_first: bool = False  # a step with a prompt decodes nothing: decodes wait for prompts
    max_waiting: int = 1024  # sequences and reservations that wait for blocks
    prefix_caching: bool = True
    layer_groups: int = 1  # 1: the KV of a chunk is published at the chunk's end, not on the way
    by_layers_bytes: int = 0  # and so is that of a chunk with less KV than this
    vocab_size: int | None = None  # None: the runner looks nothing up by token id

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_model_len", "max_num_seqs", "max_waiting", "layer_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < 1:
            raise ConfigError(
                f"max_prefill_tokens must be at least 1, not {self.max_prefill_tokens}."
            )
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

    def require_fit(self, task: GenerationTask) -> None:
        """Raise InvalidRequest for a task that this engine could never run."""
        if not task.prompt:
            raise InvalidRequest("The prompt has no tokens: send at least one.", param="prompt")
        if len(task.prompt) >= self.max_model_len:
            raise InvalidRequest(
                f"The prompt has {len(task.prompt)} tokens, but prompt and answer together may "
                f"have at most {self.max_model_len}: shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        self._require_known(task)
        self.require_blocks(self.layout.blocks_for(len(task.prompt) + len(task.output)))

    def _require_known(self, task: GenerationTask) -> None:
        biased = tuple(token for token, _ in task.sampling.logit_bias)
        for ids in (task.prompt, task.output, task.sampling.stop_token_ids, biased):
            if not self.knows(ids):
                raise InvalidRequest(
                    f"Token id {max(ids)} is out of range: the vocabulary has {self.vocab_size}."
                )

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether all are of the vocabulary. Behind this, a wrong one fails the step that it is in,
        and with it every sequence of that step."""
        # Ids are unsigned on the wire.
        return self.vocab_size is None or max(ids, default=0) < self.vocab_size

    def require_blocks(self, num_blocks: int) -> None:
        """Raise InvalidRequest for more blocks than the whole pool has."""
        if num_blocks > self.num_blocks:
            raise InvalidRequest(
                f"The prompt needs {num_blocks} KV blocks, but this worker has "
                f"{self.num_blocks}: shorten the prompt or give the worker more blocks.",
                param="prompt",
                code="context_length_exceeded",
            )
