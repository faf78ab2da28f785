"""A runner without a model, for tests of everything around it.

Each step records (position, token) for every (block, slot) that it writes. The next token is a hash
of the whole context *as read back through the block table*, so a wrong block, a missing copy or
a block that was reused too early gives an AssertionError or a wrong token; `expected_answer` says
what is right. Copying a `FakeMemory`'s blocks to another one stands for a KV transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from baton.engine.batch import (
    Batch,
    BatchItem,
    BatchResult,
    Computed,
    Launched,
    LayerCallback,
    LayerGate,
    SampleRequest,
    resolve,
)
from baton.types.fleet import KvLayout
from baton.types.request import GenerationTask, SampledToken, SamplingParams

VOCAB = 997


def fake_layout(block_size: int = 4, num_layers: int = 4, model: str = "fake") -> KvLayout:
    return KvLayout(model, "float32", num_layers, kv_heads=1, head_dim=8, block_size=block_size)


class FakeMemory:
    """What the KV pool of one worker holds: per block, slot -> (position, token)."""

    def __init__(self) -> None:
        self.blocks: dict[int, dict[int, tuple[int, int]]] = {}

    def write(self, block: int, slot: int, position: int, token: int) -> None:
        self.blocks.setdefault(block, {})[slot] = (position, token)

    def read(self, block: int, slot: int) -> tuple[int, int]:
        return self.blocks[block][slot]

    def copy_from(self, source: FakeMemory, theirs: Sequence[int], ours: Sequence[int]) -> None:
        """Transfer whole blocks: `theirs[i]` of the source to `ours[i]` here."""
        for remote, local in zip(theirs, ours, strict=True):
            self.blocks[local] = dict(source.blocks[remote])


class FakeRunner:
    """`before_step` and `after_layers` (after each announced layer group) run in the engine's
    thread: block there, or raise, to shape a test."""

    def __init__(
        self,
        layout: KvLayout | None = None,
        memory: FakeMemory | None = None,
        layer_groups: int = 1,
        before_step: Callable[[Batch], None] = lambda batch: None,
        after_layers: Callable[[int], None] = lambda layer_end: None,
    ) -> None:
        self.layout = layout or fake_layout()
        self.memory = memory or FakeMemory()
        self.layer_groups = layer_groups
        self.before_step = before_step
        self.after_layers = after_layers
        self.batches: list[Batch] = []
        self.passed: list[int] = []  # layer ends of which gates have let steps read
        self.last: dict[int, int] = {}  # sequence -> what the last step sampled
        self.closed = False

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        self.before_step(batch)
        return Computed(self.compute(batch, on_layers, before_layers))

    def compute(
        self,
        batch: Batch,
        on_layers: LayerCallback | None,
        before_layers: LayerGate | None = None,
    ) -> BatchResult:
        self.batches.append(batch)
        items = resolve(batch, self.last).items
        written: set[tuple[int, int]] = set()
        for item in items:
            self._write(item, written)
        for group in range(1, self.layer_groups + 1):
            layer_end = self.layout.num_layers * group // self.layer_groups
            if before_layers is not None:
                before_layers(layer_end)
                self.passed.append(layer_end)
            if on_layers is not None:
                on_layers(layer_end)
                self.after_layers(layer_end)
        tokens = [self._sample(item) for item in items]
        pairs = zip(items, tokens, strict=True)
        self.last = {item.sequence: token.token_id for item, token in pairs if token is not None}
        return BatchResult(tuple(tokens))

    def close(self) -> None:
        self.closed = True

    def _write(self, item: BatchItem, written: set[tuple[int, int]]) -> None:
        assert item.tokens, "an item without tokens"
        size = self.layout.block_size
        end = item.start + len(item.tokens)
        assert len(item.blocks) * size >= end, "the block table does not cover the chunk"
        assert len(set(item.blocks)) == len(item.blocks), "a block is twice in a block table"
        for position, token in enumerate(item.tokens, item.start):
            assert token < VOCAB, f"token {token} has no row in the table of embeddings"
            place = (item.blocks[position // size], position % size)
            assert place not in written, f"two sequences write to {place} in one step"
            written.add(place)
            self.memory.write(*place, position, token)

    def _sample(self, item: BatchItem) -> SampledToken | None:
        if item.sample is None:
            return None
        size = self.layout.block_size
        context = []
        for position in range(item.start + len(item.tokens)):
            found, token = self.memory.read(item.blocks[position // size], position % size)
            assert found == position, f"position {position} holds the KV of position {found}"
            context.append(token)
        return SampledToken(next_token(context, item.sample), item.sample.index)


class QueueRunner(FakeRunner):
    """A device with a queue: `launch` returns at once, and the step happens while it is waited for.
    `before_step` runs in the launching thread, `before_end` in the waiting one, before it."""

    def __init__(self, *settings: Any, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.before_end: Callable[[Batch], None] = lambda batch: None

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        self.before_step(batch)
        if before_layers is not None:
            before_layers(self.layout.num_layers)
            self.passed.append(self.layout.num_layers)
        return _Queued(self, batch, on_layers)


@dataclass(frozen=True)
class _Queued:
    runner: QueueRunner
    batch: Batch
    on_layers: LayerCallback | None

    def wait(self) -> BatchResult:
        self.runner.before_end(self.batch)
        return self.runner.compute(self.batch, self.on_layers)


def next_token(context: Sequence[int], sample: SampleRequest) -> int:
    """Depends on every context token, on the seed (unless greedy) and on the output index."""
    params = sample.params
    seed = params.seed if params.temperature > 0 else 0
    banned = sample.stop_ids if sample.index < params.min_tokens else ()
    if params.repetition_penalty != 1:
        assert [*sample.prompt, *sample.output] == list(context), "penalties see another context"
    for salt in range(len(banned) + 1):
        data = repr((salt, seed, sample.index, list(context))).encode()
        token = int.from_bytes(blake2b(data, digest_size=4).digest(), "little") % VOCAB
        if token not in banned:
            return token
    raise AssertionError("every draw was a banned token")


def expected_answer(
    prompt: Sequence[int],
    params: SamplingParams,
    eos_token_ids: tuple[int, ...] = (),
    max_model_len: int = 1 << 30,
    output: Sequence[int] = (),
) -> list[int]:
    """All answer tokens (after `output`) that an engine on a FakeRunner must give."""
    stops = (() if params.ignore_eos else eos_token_ids) + params.stop_token_ids
    context, answer = [*prompt, *output], list(output)
    while len(answer) < params.max_tokens and len(context) < max_model_len:
        full = params.repetition_penalty != 1
        sample = SampleRequest(
            params,
            len(answer),
            stops,
            tuple(prompt) if full else (),
            tuple(answer) if full else (),
        )
        token = next_token(context, sample)
        context.append(token)
        answer.append(token)
        if token in stops and len(answer) > params.min_tokens:
            break
    return answer[len(output) :]


def expected_for(task: GenerationTask, eos_token_ids: tuple[int, ...] = ()) -> list[int]:
    return expected_answer(task.prompt, task.sampling, eos_token_ids, output=task.output)
