"""Drive a decoder or a runner by hand: random block tables, chunks of any size, mixed batches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from baton.engine.batch import Batch, BatchItem, SampleRequest
from baton.engine.runner import TorchRunner, build_input
from baton.kernels.dispatch import kernels_for
from baton.kv.transport.base import PoolMemory
from baton.model.decoder import Decoder
from baton.model.spec import kv_layout, load_spec
from baton.model.weights import TORCH_DTYPES, load_weights
from baton.types.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


def request(params: SamplingParams = GREEDY, index: int = 0) -> SampleRequest:
    return SampleRequest(params, index, stop_ids=())


def open_runner(
    model_dir: Path,
    *,
    dtype: str = "float32",
    block_size: int = 16,
    num_blocks: int = 64,
    layer_groups: int = 2,
) -> tuple[TorchRunner, bytearray]:
    """A runner and the memory of its pool."""
    spec = load_spec(model_dir)
    layout = kv_layout(spec, dtype, block_size)
    memory = bytearray(num_blocks * layout.block_bytes)
    pool = PoolMemory(0, len(memory), "cpu", memory)
    return TorchRunner(spec, model_dir, layout, pool, num_blocks, "cpu", layer_groups), memory


class PlainDecoder:
    """A decoder with a pool full of NaN: reading a slot that was never written shows."""

    def __init__(self, model_dir: Path, block_size: int, num_blocks: int, dtype: str) -> None:
        spec = load_spec(model_dir)
        self.block_size = block_size
        self.decoder = Decoder(
            spec, load_weights(spec, model_dir, dtype, "cpu"), kernels_for("cpu"), "cpu"
        )
        shape = (num_blocks, spec.num_layers, 2, spec.kv_heads, block_size, spec.head_dim)
        self.kv = torch.full(shape, torch.nan, dtype=TORCH_DTYPES[dtype])

    def logits(self, items: Sequence[BatchItem]) -> torch.Tensor:
        """`[sampled rows, vocab]`."""
        with torch.inference_mode():
            batch = build_input(Batch(0, tuple(items)), self.block_size, "cpu")
            return self.decoder.forward(batch, self.kv)


@dataclass
class Track:
    """One sequence on its way through the decoder."""

    number: int
    tokens: list[int]
    blocks: tuple[int, ...]
    prompt_len: int
    done: int = 0
    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # position -> [vocab]

    def item(self, count: int) -> BatchItem:
        chunk = tuple(self.tokens[self.done : self.done + count])
        return BatchItem(self.number, chunk, self.done, self.blocks, request())


def teacher_forced(
    decoder: PlainDecoder, prompts: Sequence[Sequence[int]], decodes: int, seed: int
) -> list[Track]:
    """Run all sequences together in random chunks, their last `decodes` tokens one by one.

    Returns them with the logits of every chunk's last position.
    """
    rng = random.Random(seed)
    free = list(range(len(decoder.kv)))
    rng.shuffle(free)
    sequences = []
    for number, tokens in enumerate(prompts):
        blocks = tuple(free.pop() for _ in range(-(-len(tokens) // decoder.block_size)))
        sequences.append(Track(number, list(tokens), blocks, max(1, len(tokens) - decodes)))
    while live := [s for s in sequences if s.done < len(s.tokens)]:
        chosen = [s for s in live if rng.random() < 0.7] or live[:1]
        ready = [s for s in chosen if s.done >= s.prompt_len]
        counts = [(s, 1) for s in ready] + [
            (s, min(rng.choice((1, 7, 33, 64, 131)), s.prompt_len - s.done))
            for s in chosen
            if s.done < s.prompt_len
        ]
        rows = decoder.logits([s.item(count) for s, count in counts])
        for (sequence, count), row in zip(counts, rows, strict=True):
            sequence.done += count
            sequence.logits[sequence.done - 1] = row
    return sequences


def sharing(tokens: Sequence[int], other: Sequence[int]) -> tuple[BatchItem, BatchItem]:
    """`tokens` with the first 32 of them in blocks 0 and 1 of 16, and in the same step, behind
    those blocks, `other`, which begins with the same 32."""
    assert list(tokens[:32]) == list(other[:32])
    return (
        BatchItem(0, tuple(tokens), 0, (0, 1, 2, 3), request()),
        BatchItem(1, tuple(other[32:]), 32, (0, 1, 4, 5), request()),
    )
