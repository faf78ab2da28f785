"""The native forward pass against the decoder in torch, and against itself in other company."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.batch import BatchItem
from baton.engine.native_runner import native_batch
from baton.errors import InternalError
from baton.model.native_decoder import load_native, why_not_native
from baton.model.spec import load_spec
from baton.model.weights import load_weights
from baton.native import NativeBatch, NativeModel, Pool
from baton.native.library import CModelShape, Weight
from tests.models import FAMILIES, VOCAB_SIZE, make_tiny_model
from tests.native_kit import needs_native
from tests.unit.runners import PlainDecoder, request, sharing, teacher_forced

pytestmark = needs_native

NUM_BLOCKS = 64


class NativeDecoder:
    """A native model with a pool full of NaN, as `PlainDecoder` has one."""

    def __init__(self, model_dir: Path, block_size: int, threads: int = 2) -> None:
        spec = load_spec(model_dir)
        self.block_size = block_size
        self.model = load_native(spec, load_weights(spec, model_dir, "bfloat16", "cpu"), threads)
        shape = (NUM_BLOCKS, spec.num_layers, 2, spec.kv_heads, block_size, spec.head_dim)
        self.kv = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        self.pool = Pool(self.kv.data_ptr(), NUM_BLOCKS, block_size)

    def logits(self, items: Sequence[BatchItem]) -> torch.Tensor:
        """`[sampled rows, vocab]`."""
        logits = self.model.forward(native_batch(items), self.pool)
        values = torch.from_numpy(logits.values)[: len(logits.best)].clone()
        assert logits.best == values.argmax(dim=1).tolist()
        return values


def tiny(family: str, path: Path, **overrides: Any) -> Path:
    """A tiny model whose heads have 32 values, as the operations need."""
    wider = {"hidden_size": 128} if FAMILIES[family][0] == "qwen2" else {"head_dim": 32}
    return make_tiny_model(family, path, dtype="bfloat16", **{**wider, **overrides})


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("qwen3", tmp_path_factory.mktemp("qwen3"))


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_close_to_float32_as_those_of_torch(
    family: str, block_size: int, tmp_path: Path
) -> None:
    tiny(family, tmp_path)
    prompts = [prompt(length, seed=length) for length in (1, 6, 40, 129, 300)]
    native, exact, rounded = (
        teacher_forced(decoder, prompts, 5, 7)  # type: ignore[arg-type]
        for decoder in (
            NativeDecoder(tmp_path, block_size),
            PlainDecoder(tmp_path, block_size, NUM_BLOCKS, "float32"),
            PlainDecoder(tmp_path, block_size, NUM_BLOCKS, "bfloat16"),
        )
    )
    ours, theirs, wanted = (
        torch.stack([row for track in tracks for row in track.logits.values()])
        for tracks in (native, rounded, exact)
    )
    error = float((ours - wanted).abs().max())
    assert error < 1.5 * float((theirs - wanted).abs().max())
    best, second = wanted.topk(2).values.T
    decided = best - second > 2 * error
    assert decided.sum() > len(wanted) / 3  # else nothing has been shown
    assert torch.equal(ours.argmax(dim=1)[decided], wanted.argmax(dim=1)[decided])


@pytest.mark.parametrize("overrides", [{"intermediate_size": 144, "hidden_size": 104}])
@pytest.mark.parametrize("family", ["llama-bias", "qwen3"])
def test_sizes_that_fill_no_tile(family: str, overrides: dict[str, int], tmp_path: Path) -> None:
    tiny(family, tmp_path, vocab_size=VOCAB_SIZE + 5, **overrides)
    items = [BatchItem(0, tuple(prompt(37)), 0, (3, 1, 9), request())]
    native = NativeDecoder(tmp_path, 16).logits(items)
    exact = PlainDecoder(tmp_path, 16, NUM_BLOCKS, "float32").logits(items)
    rounded = PlainDecoder(tmp_path, 16, NUM_BLOCKS, "bfloat16").logits(items)
    assert (native - exact).abs().max() < 1.5 * (rounded - exact).abs().max()


@pytest.mark.parametrize("family", ["qwen3", "mistral", "llama-bias"])
def test_a_sequence_is_computed_alike_in_any_company(family: str, tmp_path: Path) -> None:
    """Bit for bit: other chunks, other neighbours, other blocks, other numbers of threads."""
    tiny(family, tmp_path)
    tokens = prompt(150, seed=3)
    others = [prompt(length, seed=length) for length in (70, 5, 33)]
    seen: dict[int, torch.Tensor] = {}
    for threads, seed in ((1, 0), (2, 1), (3, 2), (2, 3)):
        decoder = NativeDecoder(tmp_path, 16, threads)
        company = others if seed else []
        track, *_ = teacher_forced(decoder, [tokens, *company], 20, seed)  # type: ignore[arg-type]
        for position, row in track.logits.items():
            assert torch.equal(seen.setdefault(position, row), row)
    assert len(seen) >= 20


@pytest.mark.parametrize("own", [1, 9, 32])
def test_a_prefix_can_be_read_in_the_step_that_computes_it(own: int, qwen3: Path) -> None:
    prefix = prompt(32)
    one, two = prefix + prompt(20, 1), prefix + prompt(own, 2)
    rows = NativeDecoder(qwen3, 16).logits(sharing(one, two))
    alone = BatchItem(1, tuple(two), 0, (0, 1, 2, 3), request())
    assert torch.equal(rows[1], NativeDecoder(qwen3, 16).logits([alone])[0])


def test_sequences_that_share_blocks_keep_their_rows_and_bits(qwen3: Path) -> None:
    """Decodes behind one prefix, with a stranger between them."""
    decoder = NativeDecoder(qwen3, 16)
    shared = tuple(range(34))
    decoder.logits([BatchItem(0, tuple(prompt(544)), 0, shared, request())])
    items = [BatchItem(n, (10 + n,), 544, (*shared, 40 + n), request()) for n in range(6)]
    items.insert(2, BatchItem(6, (16,), 0, (50,), request()))
    together = decoder.logits(items)
    alone = torch.cat([decoder.logits([item]) for item in items])
    assert bool(alone.isfinite().all())
    assert torch.equal(together, alone)


def test_layers_are_announced_when_they_are_written(qwen3: Path) -> None:
    decoder = NativeDecoder(qwen3, 16)
    chunk = BatchItem(0, tuple(prompt(20)), 0, (5, 2), None)
    sampled = chunk._replace(sample=request())
    calls: list[int] = []

    def on_written(end: int) -> None:
        calls.append(end)
        written = decoder.kv[5, :end]
        assert bool(written.isfinite().all())
        assert bool(decoder.kv[5, end:].isnan().all())

    for item in (chunk, sampled):
        decoder.kv.fill_(torch.nan)
        decoder.model.forward(native_batch([item]), decoder.pool, on_written, (1, 3, 4))
    assert calls == [1, 3, 4, 1, 3, 4]
    staged = decoder.logits([sampled])
    assert torch.equal(staged, NativeDecoder(qwen3, 16).logits([sampled]))
    untouched = [block for block in range(NUM_BLOCKS) if block not in (5, 2)]
    assert bool(decoder.kv[untouched].isnan().all())


def test_steps_may_grow_and_shrink(qwen3: Path) -> None:
    """The workspace and the memory of the logits grow under a running model."""
    decoder = NativeDecoder(qwen3, 16)
    first = [BatchItem(0, tuple(prompt(9)), 0, (1,), request())]
    alone = decoder.logits(first)
    for count in (30, 2, 60):
        many = [
            BatchItem(n, tuple(prompt(10 + n % 6, seed=n)), 0, (n,), request())
            for n in range(count)
        ]
        assert decoder.logits(many).shape == (count, VOCAB_SIZE)
        assert torch.equal(decoder.logits(first), alone)


def test_what_leaves_the_model_or_the_pool_is_refused(qwen3: Path) -> None:
    decoder = NativeDecoder(qwen3, 16)
    good = NativeBatch([5, 6], [2], [14], [3], [1], [True])
    for bad, message in (
        (replace(good, tokens=[5, VOCAB_SIZE]), "outside of the vocabulary"),
        (replace(good, tokens=[-1, 5]), "outside of the vocabulary"),
        (replace(good, blocks=[NUM_BLOCKS]), "outside of the pool"),
        (replace(good, blocks=[-1]), "outside of the pool"),
        (replace(good, starts=[15]), "block table is too short"),
        (replace(good, starts=[-1]), "leave"),
        (replace(good, starts=[1 << 30]), "leave"),
        (replace(good, queries=[1]), "have 1 tokens, not 2"),
        (replace(good, queries=[3]), "leave"),
        (replace(good, queries=[0]), "leave"),
        (replace(good, table_sizes=[2]), "as long as it says"),
        (replace(good, sampled=[]), "number of sequences"),
    ):
        with pytest.raises(InternalError, match=message):
            decoder.model.forward(bad, decoder.pool)
    assert bool(decoder.kv.isnan().all())
    odd = Pool(decoder.pool.address, NUM_BLOCKS, 8)
    with pytest.raises(InternalError, match="not a multiple of 16"):
        decoder.model.forward(good, odd)
    assert decoder.model.forward(good, decoder.pool).best


def test_an_incomplete_model_does_not_run() -> None:
    shape = CModelShape(*(10, 1, 32, 32, 1, 1, 32, 100), eps=1e-6, scale=1.0, tied=True)
    model = NativeModel(shape, (0,), 1)
    memory = torch.zeros(16 * 32 * 2, dtype=torch.bfloat16)
    pool = Pool(memory.data_ptr(), 1, 16)
    with pytest.raises(InternalError, match="not all weights were loaded"):
        model.forward(NativeBatch([1], [1], [0], [0], [1], [True]), pool)
    values = torch.zeros(64, dtype=torch.bfloat16)
    for weight, layer, count, message in (
        (Weight.NORM, 0, 31, "has 31 values, not 32"),
        (Weight.QKV_BIAS, 0, 32, "not 0"),
        (Weight.INPUT_NORM, 1, 32, "no layer 1"),
        (Weight.NORM, -1, 32, "no layer -1"),
    ):
        with pytest.raises(InternalError, match=message):
            model.load(weight, layer, values.data_ptr(), count)


def test_the_profile_tells_where_the_time_went(qwen3: Path) -> None:
    decoder = NativeDecoder(qwen3, 16)
    decoder.logits([BatchItem(0, tuple(prompt(40)), 0, (1, 2, 3), request())])
    profile = decoder.model.profile()
    assert profile.steps == 1
    assert all(seconds >= 0 for seconds in profile.seconds.values())
    assert profile.seconds["attention"] > 0
    assert 0 < sum(profile.seconds.values()) <= profile.total_s * 1.001
    empty = decoder.model.profile()
    assert (empty.steps, empty.total_s) == (0, 0.0)


def test_close_is_idempotent_and_final(qwen3: Path) -> None:
    decoder = NativeDecoder(qwen3, 16)
    item = BatchItem(0, (5,), 0, (1,), request())
    logits = decoder.model.forward(native_batch([item]), decoder.pool)
    decoder.model.close()
    decoder.model.close()
    assert len(logits.values[0]) == VOCAB_SIZE  # still readable
    with pytest.raises(InternalError, match="closed"):
        decoder.model.forward(native_batch([item]), decoder.pool)


def test_weights_are_moved_not_copied(qwen3: Path) -> None:
    spec = load_spec(qwen3)
    weights = load_weights(spec, qwen3, "bfloat16", "cpu")
    load_native(spec, weights, 1)
    left = [weights.embedding, weights.norm, weights.layers[0].qkv, weights.layers[3].down]
    assert [tensor.numel() for tensor in left] == [0, 0, 0, 0]


def test_models_that_do_not_fit_are_named(qwen3: Path) -> None:
    spec = load_spec(qwen3)
    assert why_not_native(spec, "cpu", "bfloat16") is None
    for wrong, message in (
        (replace(spec, head_dim=48), "head_dim is 48"),
        (replace(spec, head_dim=288), "head_dim is 288"),
        (replace(spec, intermediate_size=100), "intermediate_size is 100"),
    ):
        assert message in (why_not_native(wrong, "cpu", "bfloat16") or "")
    assert "not float32" in (why_not_native(spec, "cpu", "float32") or "")
    assert "not on cuda:0" in (why_not_native(spec, "cuda:0", "bfloat16") or "")
