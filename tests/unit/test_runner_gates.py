"""Every runner asks before it reads layers that others write, and ends cleanly when told not to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.cpus import Placement
from baton.engine.batch import Batch, BatchItem, Runner
from baton.engine.cuda_runner import CudaRunner
from baton.engine.gate import GateClosed
from baton.engine.graph_backend import HostBackend
from baton.engine.make_runner import make_runner
from baton.kernels.dispatch import kernels_for
from baton.kv.transport.base import PoolMemory
from baton.model.spec import kv_layout, load_spec
from tests.models import make_tiny_model
from tests.native_kit import needs_native
from tests.unit.runners import request

LAYERS, BLOCKS, GROUPS = 4, 4, 2
PROMPT = tuple(range(3, 40))
PREFIX = 32  # tokens, two blocks
TABLE = (2, 0, 3)
SUFFIX = BatchItem(1, PROMPT[PREFIX:], PREFIX, TABLE, request())
LAST = BatchItem(1, PROMPT[-1:], len(PROMPT) - 1, TABLE, request())  # looks like a decode


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    return make_tiny_model("qwen3", path, dtype="bfloat16", seed=5, max_len=96)


def open_runner(model_dir: Path, kind: str) -> tuple[Runner, torch.Tensor]:
    """A runner and its pool's bytes `[blocks, layers, bytes]`."""
    spec = load_spec(model_dir)
    layout = kv_layout(spec, "bfloat16", 16)
    memory = torch.zeros(BLOCKS * layout.block_bytes, dtype=torch.uint8)
    pool = PoolMemory(memory.data_ptr(), len(memory), "cpu", memory)
    common = (spec, model_dir, layout, pool, BLOCKS)
    runner: Runner
    if kind == "queued":
        kernels, backend = kernels_for("cpu", "reference"), HostBackend()
        queued = CudaRunner(*common, GROUPS, kernels, backend, buckets=(1, 2))
        queued.warm_up()
        runner = queued
    else:
        runner = make_runner(*common, "cpu", GROUPS, Placement((0,), 1), kind)
    return runner, memory.view(BLOCKS, LAYERS, -1)


class Arriving:
    """The prefix, of which each layer is not a number until somebody asks for it."""

    def __init__(self, pool: torch.Tensor, last: int = LAYERS) -> None:
        self.pool, self.last = pool, last
        self.asked: list[int] = []
        self.kv = pool[list(TABLE[:2])].clone()
        pool[list(TABLE[:2])] = 0xFF

    def __call__(self, layer_end: int) -> None:
        self.asked.append(layer_end)
        if layer_end > self.last:
            raise GateClosed
        for block, kv in zip(TABLE[:2], self.kv, strict=True):
            self.pool[block, :layer_end] = kv[:layer_end]


@needs_native
@pytest.mark.parametrize("item", [SUFFIX, LAST], ids=["chunk", "one token"])
@pytest.mark.parametrize("kind", ["native", "reference", "queued"])
def test_layers_are_read_when_the_gate_has_let_them(
    kind: str, item: BatchItem, model_dir: Path
) -> None:
    runner, pool = open_runner(model_dir, kind)
    runner.launch(Batch(1, (BatchItem(1, PROMPT[: item.start], 0, TABLE),))).wait()
    arriving = Arriving(pool)
    early = runner.launch(Batch(2, (item,)), None, arriving).wait()
    assert arriving.asked == sorted(arriving.asked)
    assert arriving.asked[-1] == LAYERS
    assert len(arriving.asked) >= GROUPS
    kv = pool.clone()
    again = runner.launch(Batch(3, (item,))).wait()
    assert early == again
    assert torch.equal(kv[list(TABLE[:2])], pool[list(TABLE[:2])])
    runner.close()


@needs_native
@pytest.mark.parametrize("kind", ["native", "reference", "queued"])
def test_a_gate_that_closes_ends_the_step(kind: str, model_dir: Path) -> None:
    runner, pool = open_runner(model_dir, kind)
    runner.launch(Batch(1, (BatchItem(1, PROMPT[:PREFIX], 0, TABLE),))).wait()
    right = runner.launch(Batch(2, (SUFFIX,))).wait()
    arriving = Arriving(pool, last=LAYERS // 2)
    with pytest.raises(GateClosed):
        runner.launch(Batch(3, (SUFFIX,)), None, arriving)
    arriving.last = LAYERS
    arriving(LAYERS)
    assert runner.launch(Batch(4, (SUFFIX,))).wait() == right
    runner.close()
