"""Operations and bytes against numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.bench.engine_cost import Chunk, Matrix, ModelCost, Work, prompt_chunks, visible_pairs
from baton.bench.engine_models import SHAPES, write_random_model
from baton.model.spec import load_spec

# tiny: hidden 128, 2 layers, 4 heads and 2 KV heads of 32, MLP 256, vocabulary 1,024, tied.
QKV = 2 * 256 * 128  # operations for one row: (4 + 2 * 2) heads of 32 from 128
MIXING = 2 * 128 * 128 + 2 * 512 * 128 + 2 * 128 * 256
HEAD = 2 * 1024 * 128
PAIR = 4 * 4 * 32  # of one query and one key, QK^T and PV, in one layer
TO_KV = 128 + 256 * 128 + 2 * 32  # weights of one layer: norm, projections, query and key norm
BEHIND = 128 + 128 * 128 + 512 * 128 + 128 * 256  # norm, output, gate and up, down
LAYER_KV = 2 * 2 * 32 * 2  # bytes of one token in one layer


@pytest.fixture(scope="module")
def cost(tmp_path_factory: pytest.TempPathFactory) -> ModelCost:
    directory = write_random_model(SHAPES["tiny"], tmp_path_factory.mktemp("tiny"))
    return ModelCost(load_spec(directory), "bfloat16")


def test_one_decode(cost: ModelCost) -> None:
    work = cost.step([Chunk(9, 1)])
    assert work.flops == 2 * QKV + 2 * MIXING + HEAD + 2 * 10 * PAIR
    assert work.read == 2 * (2 * TO_KV + 2 * BEHIND + 128 + 1024 * 128) + 2 * 9 * LAYER_KV
    assert work.written == 2 * LAYER_KV


def test_weights_are_read_once_for_a_whole_batch(cost: ModelCost) -> None:
    one, many = cost.step([Chunk(9, 1)]), cost.step([Chunk(9, 1)] * 8)
    assert many.flops == 8 * one.flops
    assert many.read - one.read == 7 * 2 * 9 * LAYER_KV


def test_a_chunk_that_is_not_sampled_ends_with_the_last_layers_kv(cost: ModelCost) -> None:
    work = cost.step([Chunk(0, 4, sampled=False)])
    assert work.flops == 4 * (2 * QKV + MIXING) + (1 + 2 + 3 + 4) * PAIR
    assert work.read == 2 * (2 * TO_KV + BEHIND)


def test_a_prompts_last_chunk_needs_one_row_of_the_last_layer(cost: ModelCost) -> None:
    work = cost.step([Chunk(4, 2)])
    products = 2 * (2 * QKV + MIXING) + MIXING + HEAD
    assert work.flops == products + (5 + 6) * PAIR + 6 * PAIR
    assert work.written == 2 * 2 * LAYER_KV


@pytest.mark.parametrize(
    "chunks", [[Chunk(9, 1)] * 3, [Chunk(4, 4, sampled=False)], [Chunk(9, 1), Chunk(0, 5)]]
)
def test_operations_add_up_to_the_step(cost: ModelCost, chunks: list[Chunk]) -> None:
    parts, step = sum(cost.operations(chunks).values(), Work()), cost.step(chunks)
    norms = step.read - parts.read  # vectors are all that is left
    assert parts.flops == step.flops
    assert 0 < norms < 0.01 * step.read


def test_a_window_limits_keys_and_their_bytes(cost: ModelCost) -> None:
    narrow = replace(cost, spec=replace(cost.spec, windows=(4, 4)))
    work = narrow.step([Chunk(99, 1)])
    full = cost.step([Chunk(99, 1)])
    assert full.flops - work.flops == 2 * (100 - 4) * PAIR
    assert full.read - work.read == 2 * (99 - 3) * LAYER_KV


def test_attention_alone_reads_queries_and_every_visible_key(cost: ModelCost) -> None:
    work = cost.attention([Chunk(9, 1), Chunk(0, 3)], layer=0)
    assert work.flops == (10 + 1 + 2 + 3) * PAIR
    assert work.read == 4 * 4 * 32 * 2 + (10 + 3) * LAYER_KV
    assert work.written == 4 * 4 * 32 * 2


def test_known_models_have_their_known_sizes() -> None:
    """Qwen3-8B has 8.19 billion parameters, 0.62 of them in the embedding; 144 KiB of KV."""
    values = {}
    for name in ("qwen3-0.6b", "qwen3-8b"):
        values[name] = 0
        for _, extent in SHAPES[name].tensors():
            size = 1
            for count in extent:
                size *= count
            values[name] += size
    assert round(values["qwen3-8b"] / 1e9, 2) == 8.19
    assert round(values["qwen3-0.6b"] / 1e9, 3) == 0.596


def test_float32_doubles_bytes_only(cost: ModelCost) -> None:
    half, full = cost.step([Chunk(9, 1)]), replace(cost, dtype="float32").step([Chunk(9, 1)])
    assert full == Work(half.flops, 2 * half.read, 2 * half.written)


@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_pairs_agree_with_counting(window: int) -> None:
    for start in range(8):
        for tokens in range(1, 8):
            positions = range(start, start + tokens)
            counted = sum(min(p + 1, window) if window else p + 1 for p in positions)
            assert visible_pairs(start, tokens, window) == counted


def test_prompts_are_cut_as_the_engine_does() -> None:
    assert prompt_chunks(5, 8) == (Chunk(0, 5),)
    assert prompt_chunks(16, 8) == (Chunk(0, 8, sampled=False), Chunk(8, 8))
    assert prompt_chunks(17, 8) == (Chunk(0, 8, False), Chunk(8, 8, False), Chunk(16, 1))


def test_a_product_reads_its_operands_once() -> None:
    assert Matrix("m", 3, 5).product(2, 2) == Work(2 * 2 * 3 * 5, 2 * (15 + 10), 2 * 6)
