"""A model with its runner and a pool full of KV, outside of any engine, and batches for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from baton.bench.engine_cost import Chunk, ModelCost
from baton.bench.engine_device import Device
from baton.cpus import Placement
from baton.engine.batch import Batch, BatchItem, Launched, Runner, SampleRequest
from baton.engine.make_runner import make_runner
from baton.errors import ConfigError
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.memory import make_pool
from baton.model.spec import ModelSpec, choose_dtype, kv_layout, load_spec
from baton.model.weights import TORCH_DTYPES
from baton.types.fleet import KvLayout
from baton.types.request import SamplingParams

_PATTERN = 1 << 20  # random values that the whole pool repeats

GREEDY = SampleRequest(SamplingParams(temperature=0.0, ignore_eos=True), index=0, stop_ids=())


@dataclass(frozen=True, slots=True)
class Model:
    """What is measured, before anything large has been loaded."""

    directory: Path
    spec: ModelSpec
    layout: KvLayout

    @property
    def cost(self) -> ModelCost:
        return ModelCost(self.spec, self.layout.dtype)


def find_model(directory: Path, device: Device, dtype: str, block_size: int) -> Model:
    """Raises ModelLoadError and ConfigError."""
    spec = load_spec(directory)
    return Model(
        directory, spec, kv_layout(spec, choose_dtype(dtype, spec, device.name), block_size)
    )


@dataclass(frozen=True, slots=True)
class Rig:
    """Valid inside of `open_rig`. The pool holds random KV in every block."""

    model: Model
    runner: Runner
    memory: PoolMemory
    num_blocks: int
    order: tuple[int, ...]  # block ids, scattered as in a pool that has been in use

    def blocks(self, sequences: Sequence[Chunk]) -> int:
        """That `batch` needs."""
        blocks_for = self.model.layout.blocks_for
        return sum(blocks_for(chunk.start + chunk.tokens) for chunk in sequences)

    def batch(self, sequences: Sequence[Chunk]) -> Batch:
        """One step of these chunks, each of a sequence with blocks of its own.

        Raises ConfigError when the pool is too small.
        """
        free = iter(self.order)
        items = []
        for number, chunk in enumerate(sequences):
            wanted = self.model.layout.blocks_for(chunk.start + chunk.tokens)
            blocks = tuple(islice(free, wanted))
            if len(blocks) < wanted:
                raise ConfigError(f"{self.num_blocks} blocks are not enough for this batch")
            tokens = tuple((number + at) % self.model.spec.vocab_size for at in range(chunk.tokens))
            sample = GREEDY if chunk.sampled else None
            items.append(BatchItem(number, tokens, chunk.start, blocks, sample))
        return Batch(0, tuple(items))


@contextmanager
def open_rig(model: Model, device: Device, num_blocks: int, kernels: str = "auto") -> Iterator[Rig]:
    """Load the weights, make the pool and warm up. `kernels` as in `make_runner`.

    Raises ModelLoadError and ConfigError.
    """
    memory = make_pool(num_blocks * model.layout.block_bytes, device.name)
    runner = make_runner(
        model.spec,
        model.directory,
        model.layout,
        memory,
        num_blocks,
        device.name,
        layer_groups=1,
        placement=Placement(device.cpus, device.threads),
        kernels=kernels,
    )
    try:
        runner.warm_up()
        fill(memory, TORCH_DTYPES[model.layout.dtype])
        device.sync()  # runners on CUDA have a stream of their own
        order = np.random.default_rng(0).permutation(num_blocks)
        yield Rig(model, runner, memory, num_blocks, tuple(order.tolist()))
    finally:
        runner.close()


def fill(memory: PoolMemory, dtype: torch.dtype) -> None:
    """Random values in the whole pool: zeros would be kinder to caches and to a GPU's clocks."""
    raw = memory.buffer
    tensor = raw if isinstance(raw, torch.Tensor) else torch.frombuffer(raw, dtype=torch.uint8)
    flat = tensor.view(dtype)
    pattern = torch.randn(min(_PATTERN, len(flat))).to(dtype).to(flat.device)
    for start in range(0, len(flat), len(pattern)):
        part = flat[start : start + len(pattern)]
        part.copy_(pattern[: len(part)])


def run(runner: Runner, batches: Sequence[Batch]) -> None:
    """Execute the batches as the engine does: the next is launched while one is computed."""
    running: Launched | None = None
    for batch in batches:
        launched = runner.launch(batch)
        if running is not None:
            running.wait()
        running = launched
    if running is not None:
        running.wait()
