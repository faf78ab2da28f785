"""What the scheduler hands to the runner and what comes back: frozen values, no torch.

The runner is a seam: `TorchRunner` computes, a modelled runner answers from a cost model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from baton.types.request import SampledToken, SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """How to turn an item's last logits into a token.

    `prompt` and `output` are given only when a penalty needs them (else empty), so that a step
    does not copy whole contexts for nothing.
    """

    params: SamplingParams
    index: int  # output index of the token to sample; with params.seed the generator's key
    stop_ids: tuple[int, ...]  # masked while index < params.min_tokens
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchItem:
    """`tokens` are at positions [start, start + len(tokens)); their KV is written by this step.

    `blocks` covers at least start + len(tokens) tokens; KV of [0, start) is already in it. The
    blocks stay allocated to the sequence until the step's result has been committed.
    """

    sequence: int  # engine-wide number, stable over the sequence's life
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    sample: SampleRequest | None = None  # None: a chunk that does not end its context


@dataclass(frozen=True, slots=True)
class Batch:
    step: int
    items: tuple[BatchItem, ...]  # decodes first, then prefill chunks

    @property
    def num_tokens(self) -> int:
        return sum(len(item.tokens) for item in self.items)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """`tokens[i]` belongs to `batch.items[i]`; None where nothing was sampled."""

    tokens: tuple[SampledToken | None, ...]


LayerCallback = Callable[[int], None]
"""Called with `layer_end` when the KV of layers [0, layer_end) of the whole batch is final in
pool memory and may be read by a transport. Called from the runner's thread, ascending, the last
call with num_layers, before `execute` returns."""


class Runner(Protocol):
    """Executes batches on one device. Blocking; called from one thread at a time."""

    def execute(self, batch: Batch, on_layers: LayerCallback | None = None) -> BatchResult: ...

    def close(self) -> None:
        """Free device memory and threads. Idempotent."""
