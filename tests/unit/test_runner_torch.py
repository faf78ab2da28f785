"""The torch runner: flattening, layer callbacks, the pool it writes, its life."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.engine.batch import Batch, BatchItem, BatchResult, LayerCallback, SampleRequest
from baton.engine.runner import TorchRunner, build_input
from baton.errors import ConfigError, InternalError
from baton.kv.transport.base import PoolMemory
from baton.model.spec import kv_layout, load_spec
from baton.types.request import SamplingParams
from tests.models import make_tiny_model
from tests.unit.runners import open_runner, request

PROMPT = tuple(range(3, 40))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"))


def step(*items: BatchItem) -> Batch:
    return Batch(0, items)


def execute(
    runner: TorchRunner, batch: Batch, on_layers: LayerCallback | None = None
) -> BatchResult:
    return runner.launch(batch, on_layers).wait()


def test_batch_is_flattened() -> None:
    items = (
        BatchItem(1, (50,), 17, (4, 9), request()),
        BatchItem(2, (60,), 0, (5,), request()),
        BatchItem(3, (70, 71, 72), 15, (7, 3), None),
        BatchItem(4, (80,), 16, (6, 2), request()),
    )
    flat = build_input(step(*items), 16, "cpu")
    assert flat.tokens.tolist() == [50, 60, 70, 71, 72, 80]
    assert flat.positions.tolist() == [17, 0, 15, 16, 17, 16]
    assert flat.slots.tolist() == [145, 80, 127, 48, 49, 32]
    assert flat.num_decodes == 2
    assert flat.decode_tables.tolist() == [[4, 9], [5, 0]]
    assert flat.decode_lens.tolist() == [18, 1]
    assert flat.prefill_tables.tolist() == [[7, 3], [6, 2]]
    assert flat.query_start.tolist() == [0, 3, 4]
    assert flat.context_lens.tolist() == [15, 16]
    assert flat.sample_rows.tolist() == [0, 1, 5]
    assert flat.tokens.dtype == flat.slots.dtype == torch.int64
    assert flat.decode_tables.dtype == flat.query_start.dtype == torch.int32


def test_only_items_that_ask_get_a_token(model_dir: Path) -> None:
    runner, _ = open_runner(model_dir)
    sampling = SamplingParams(temperature=0.8, seed=4, logprobs=2)
    result = execute(
        runner,
        step(
            BatchItem(1, PROMPT[:20], 0, (0, 1), None),
            BatchItem(2, PROMPT, 0, (2, 3, 4), SampleRequest(sampling, 0, ())),
        ),
    )
    nothing, token = result.tokens
    assert nothing is None
    assert token is not None
    assert token.index == 0
    assert token.logprob is not None
    assert len(token.logprob.top) == 2
    silent = execute(runner, step(BatchItem(1, PROMPT[20:], 20, (0, 1, 5), None)))
    assert silent.tokens == (None,)


@pytest.mark.parametrize("layer_groups", [1, 2, 3, 4, 9])
def test_layers_are_announced_in_groups(layer_groups: int, model_dir: Path) -> None:
    runner, memory = open_runner(model_dir, layer_groups=layer_groups)
    layer_bytes = len(memory) // 64 // 4
    calls: list[int] = []

    def on_layers(layer_end: int) -> None:
        calls.append(layer_end)
        # What has been announced is in the pool now, and nothing else is.
        for layer in range(4):
            written = any(memory[layer * layer_bytes : (layer + 1) * layer_bytes])
            assert written == (layer < layer_end)

    execute(runner, step(BatchItem(1, PROMPT[:16], 0, (0,), request())), on_layers)
    ends = {1: [4], 2: [2, 4], 3: [2, 4], 4: [1, 2, 3, 4], 9: [1, 2, 3, 4]}
    assert calls == ends[layer_groups]


def test_layers_are_announced_for_chunks_that_sample_nothing(model_dir: Path) -> None:
    runner, _ = open_runner(model_dir)
    calls: list[int] = []
    execute(runner, step(BatchItem(1, PROMPT[:16], 0, (0,), None)), calls.append)
    assert calls == [2, 4]


def test_kv_goes_to_its_blocks_and_nowhere_else(model_dir: Path) -> None:
    runner, memory = open_runner(model_dir, num_blocks=8)
    block_bytes = len(memory) // 8
    execute(runner, step(BatchItem(1, PROMPT[:20], 0, (6, 2), request())))
    touched = [any(memory[i * block_bytes : (i + 1) * block_bytes]) for i in range(8)]
    assert touched == [False, False, True, False, False, False, True, False]


def test_blocks_can_be_moved_to_another_runner(model_dir: Path) -> None:
    """What a handoff does: copy whole blocks, continue elsewhere in other places."""
    prefill, source = open_runner(model_dir, num_blocks=8)
    decode, target = open_runner(model_dir, num_blocks=16)
    size = len(source) // 8
    first = execute(prefill, step(BatchItem(1, PROMPT, 0, (5, 1, 7), request()))).tokens[0]
    assert first is not None
    for here, there in zip((5, 1, 7), (14, 3, 9), strict=True):
        target[there * size : (there + 1) * size] = source[here * size : (here + 1) * size]

    def answer(runner: TorchRunner, blocks: tuple[int, ...]) -> list[int]:
        tokens = [first.token_id]
        for index in range(1, 8):
            item = BatchItem(
                1, (tokens[-1],), len(PROMPT) + index - 1, blocks, request(index=index)
            )
            sampled = execute(runner, step(item)).tokens[0]
            assert sampled is not None
            tokens.append(sampled.token_id)
        return tokens

    assert answer(decode, (14, 3, 9)) == answer(prefill, (5, 1, 7))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_warm_up_leaves_the_pool_zeroed(dtype: str, model_dir: Path) -> None:
    runner, memory = open_runner(model_dir, dtype=dtype, num_blocks=2)
    runner.warm_up()
    assert not any(memory)


def test_close_is_idempotent_and_lets_go_of_the_memory(model_dir: Path) -> None:
    runner, memory = open_runner(model_dir)
    runner.close()
    runner.close()
    memory.clear()  # raises BufferError while anything still views it
    with pytest.raises(InternalError, match="closed"):
        execute(runner, step(BatchItem(1, (5,), 0, (0,), request())))
    with pytest.raises(InternalError, match="closed"):
        runner.warm_up()


def test_pool_in_a_tensor(model_dir: Path) -> None:
    spec = load_spec(model_dir)
    layout = kv_layout(spec, "float32", 16)
    buffer = torch.zeros(4 * layout.block_bytes + 64, dtype=torch.uint8)
    pool = PoolMemory(buffer.data_ptr(), len(buffer), "cpu", buffer)
    runner = TorchRunner(spec, model_dir, layout, pool, 4, "cpu", 1)
    execute(runner, step(BatchItem(1, PROMPT[:9], 0, (3,), request())))
    assert buffer[3 * layout.block_bytes : 4 * layout.block_bytes].any()
    assert not buffer[: 3 * layout.block_bytes].any()


def test_threads_are_set(model_dir: Path) -> None:
    spec = load_spec(model_dir)
    layout = kv_layout(spec, "float32", 16)
    memory = bytearray(layout.block_bytes)
    pool, before = PoolMemory(0, len(memory), "cpu", memory), torch.get_num_threads()
    try:
        TorchRunner(spec, model_dir, layout, pool, 1, "cpu", 1, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused(model_dir: Path) -> None:
    spec = load_spec(model_dir)
    layout = kv_layout(spec, "float32", 16)
    memory = bytearray(2 * layout.block_bytes)
    pool = PoolMemory(0, len(memory), "cpu", memory)
    for bad, message in (
        (replace(layout, model="0" * 32), "not of this model"),
        (replace(layout, kv_heads=1), "not of this model"),
        (replace(layout, dtype="float16"), "computes in float32 or bfloat16"),
        (replace(layout, quantization="int8"), "without quantization"),
    ):
        with pytest.raises(ConfigError, match=message):
            TorchRunner(spec, model_dir, bad, pool, 2, "cpu", 1)
    with pytest.raises(ConfigError, match="a pool of 3 blocks takes"):
        TorchRunner(spec, model_dir, layout, pool, 3, "cpu", 1)
    with pytest.raises(ConfigError, match="layer_groups"):
        TorchRunner(spec, model_dir, layout, pool, 2, "cpu", 0)


def test_nan_weights_are_an_error_not_garbage(tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file)
    runner, _ = open_runner(tmp_path)
    with pytest.raises(InternalError, match="not finite"):
        execute(runner, step(BatchItem(1, (5, 6), 0, (0,), request())))
