"""What the scheduler hands to the runner and what comes back: frozen values, no torch.

The runner is a seam: `TorchRunner` computes, a modelled runner answers from a cost model.

A step may be launched before the result of the one before it is known, so that a device never waits
for the event loop. What such a step cannot know yet is the token that the one before samples: its
items *follow* that token, and the runner, which has it first, fills it in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.errors import InternalError
from baton.types.request import SampledToken, SamplingParams


class SampleRequest(NamedTuple):
    """How to turn an item's last logits into a token.

    `prompt` and `output` are given only when a penalty needs them (else empty), so that a step
    does not copy whole contexts for nothing. `output` of an item that follows a token lacks that
    token: see `after`.
    """

    params: SamplingParams
    index: int  # type: ignore[assignment]  # of the token in the answer; keys the generator
    stop_ids: tuple[int, ...]  # masked while index < params.min_tokens
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()

    @property
    def penalized(self) -> bool:
        """Whether the context has a part in the choice."""
        return bool(self.prompt)

    def after(self, token: int) -> SampleRequest:
        """The penalized request of an item that follows, with the token that it follows."""
        return self._replace(output=(*self.output, token))


class BatchItem(NamedTuple):
    """One sequence's part in a step. Its tokens are at positions [start, start + length); their KV
    is written by this step.

    An item that `follows` is one token long and has no `tokens`: its token is the one that the step
    launched just before this one samples for the same sequence.

    `blocks` covers at least start + length tokens; KV of [0, start) is in it when all steps before
    this one have ended, or is written by other items of this step: a runner writes a layer's KV of
    all items before it attends to any. The blocks stay allocated to the sequence until the step's
    result has been committed.
    """

    sequence: int  # engine-wide number, stable over the sequence's life
    tokens: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]  # the same object from step to step until the sequence gets a block
    sample: SampleRequest | None = None  # None: a chunk that does not end its context
    follows: bool = False

    @property
    def length(self) -> int:
        return 1 if self.follows else len(self.tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    step: int
    items: tuple[BatchItem, ...]  # decodes first, then prefill chunks

    @property
    def num_tokens(self) -> int:
        return sum(item.length for item in self.items)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """`tokens[i]` belongs to `batch.items[i]`; None where nothing was sampled."""

    tokens: tuple[SampledToken | None, ...]


LayerCallback = Callable[[int], None]
"""Called with `layer_end` when the KV of layers [0, layer_end) of the whole batch is final in
pool memory and may be read by a transport. Called from the runner's threads, ascending, the last
call with num_layers, before `wait` returns, and never while one for an earlier step is due."""

LayerGate = Callable[[int], None]
"""Called with `layer_end`, ascending, before the step reads those layers [.., layer_end) of KV that
it does not write itself. Called from the thread of `launch`, which it may keep waiting."""


class Launched(Protocol):
    """A step on its way through the device."""

    def wait(self) -> BatchResult:
        """Block until the step has ended. Called once, from another thread than `launch`, for one
        step after the other in the order of their launches. Raises what made the step fail."""


class Runner(Protocol):
    """Executes batches on one device, in the order in which they are launched."""

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        """Start a step. Called from one thread, at most once more before the last step has been
        waited for. If `before_layers` raises, so does this, when nothing writes to the step's
        blocks any more.

        A device with a queue of its own gets the whole step here and this returns at once; one
        without computes the step here, and `wait` has nothing to wait for. Raises what made the
        step fail; then the step after it is not launched before the engine has dealt with that.
        """

    def close(self) -> None:
        """Free device memory and threads, when no step is on its way. Idempotent."""


@dataclass(frozen=True, slots=True)
class Computed:
    """A `Launched` of a device without a queue: everything happened in `launch`."""

    result: BatchResult

    def wait(self) -> BatchResult:
        return self.result


def resolve(batch: Batch, last: Mapping[int, int]) -> Batch:
    """The batch with the tokens that its items follow, from those that the step before sampled."""
    if not any(item.follows for item in batch.items):
        return batch
    return Batch(batch.step, tuple(_resolved(item, last) for item in batch.items))


def last_tokens(
    items: Sequence[BatchItem], tokens: Sequence[SampledToken | None]
) -> dict[int, int]:
    """What `resolve` needs for the next step, by sequence: the tokens that this one sampled."""
    return {
        item.sequence: token.token_id
        for item, token in zip(items, tokens, strict=True)
        if token is not None
    }


def _resolved(item: BatchItem, last: Mapping[int, int]) -> BatchItem:
    if not item.follows:
        return item
    token = last.get(item.sequence)
    if token is None:
        raise InternalError(f"Sequence {item.sequence} follows a token that was not sampled.")
    sample = item.sample
    if sample is not None and sample.penalized:
        sample = sample.after(token)
    return BatchItem(item.sequence, (token,), item.start, item.blocks, sample)
