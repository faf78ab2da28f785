"""The native runner: the same contract as the torch runner's, and which of the two is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.cpus import Placement
from baton.engine import make_runner as choice
from baton.engine.batch import Batch, BatchItem, Runner
from baton.engine.make_runner import make_runner
from baton.engine.native_runner import NativeRunner
from baton.engine.runner import TorchRunner
from baton.errors import ConfigError, InternalError
from baton.kernels import dispatch
from baton.kv.transport.base import PoolMemory
from baton.model.spec import kv_layout, load_spec
from baton.native import library
from baton.types.request import SamplingParams
from baton.worker.config import KERNELS
from tests.models import make_tiny_model
from tests.native_kit import needs_native
from tests.unit.runners import request

PROMPT = tuple(range(3, 40))
BLOCKS = (5, 1, 7)
PLACE = Placement((0,), 1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    return make_tiny_model("qwen3", path, dtype="bfloat16", seed=5)


def open_runner(
    model_dir: Path, kernels: str = "native", *, dtype: str = "bfloat16", num_blocks: int = 8
) -> tuple[Runner, bytearray]:
    spec = load_spec(model_dir)
    layout = kv_layout(spec, dtype, 16)
    memory = bytearray(num_blocks * layout.block_bytes)
    pool = PoolMemory(0, len(memory), "cpu", memory)
    return make_runner(spec, model_dir, layout, pool, num_blocks, "cpu", 2, PLACE, kernels), memory


def step(*items: BatchItem) -> Batch:
    return Batch(0, items)


def answer(runner: Runner, params: SamplingParams, length: int = 12) -> list[int]:
    """Tokens after PROMPT; the later ones follow the step before."""
    tokens = []
    item = BatchItem(1, PROMPT, 0, BLOCKS, request(params))
    for index in range(length):
        (token,) = runner.launch(step(item)).wait().tokens
        assert token is not None
        assert token.index == index
        tokens.append(token.token_id)
        at = len(PROMPT) + index
        item = BatchItem(1, (), at, BLOCKS, request(params, index + 1), follows=True)
    return tokens


@needs_native
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logit_bias=((7, 3.0),), min_tokens=3),
        SamplingParams(temperature=0.7, top_k=1, seed=3, logprobs=2),
    ],
    ids=["greedy", "adjusted", "drawn"],
)
def test_answers_are_those_of_torch(model_dir: Path, params: SamplingParams) -> None:
    native, _ = open_runner(model_dir)
    torch_runner, _ = open_runner(model_dir, "reference")
    assert isinstance(native, NativeRunner)
    assert isinstance(torch_runner, TorchRunner)
    assert answer(native, params) == answer(torch_runner, params)
    native.close()


@needs_native
def test_layers_are_announced_in_groups(model_dir: Path) -> None:
    runner, memory = open_runner(model_dir)
    layer_bytes = len(memory) // 8 // 4
    calls: list[int] = []

    def on_layers(layer_end: int) -> None:
        calls.append(layer_end)
        for layer in range(4):
            assert any(memory[layer * layer_bytes : (layer + 1) * layer_bytes]) == (
                layer < layer_end
            )

    sampled = BatchItem(1, PROMPT[:16], 0, (0,), request())
    runner.launch(step(sampled), on_layers)
    assert calls == [2, 4]
    silent = runner.launch(step(sampled._replace(sample=None)), calls.append).wait()
    assert calls == [2, 4, 2, 4]
    assert silent.tokens == (None,)


@needs_native
def test_warm_up_leaves_the_pool_zeroed(model_dir: Path) -> None:
    runner, memory = open_runner(model_dir)
    assert isinstance(runner, NativeRunner)
    runner.warm_up()
    assert runner.profile().steps == 2
    assert not any(memory)


@needs_native
def test_close_is_idempotent_and_lets_go_of_the_memory(model_dir: Path) -> None:
    runner, memory = open_runner(model_dir)
    assert isinstance(runner, NativeRunner)
    runner.close()
    runner.close()
    memory.clear()  # raises BufferError while anything still views it
    with pytest.raises(InternalError, match="closed"):
        runner.launch(step(BatchItem(1, (5,), 0, (0,), request())))
    with pytest.raises(InternalError, match="closed"):
        runner.warm_up()


@needs_native
def test_nan_weights_are_an_error_not_garbage(model_dir: Path, tmp_path: Path) -> None:
    make_tiny_model("qwen3", tmp_path, dtype="bfloat16")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file)
    runner, _ = open_runner(tmp_path)
    with pytest.raises(InternalError, match="not finite"):
        runner.launch(step(BatchItem(1, (5, 6), 0, (0,), request())))


@needs_native
def test_auto_is_native_where_that_fits(model_dir: Path) -> None:
    assert isinstance(open_runner(model_dir, "auto")[0], NativeRunner)
    assert isinstance(open_runner(model_dir, "auto", dtype="float32")[0], TorchRunner)
    with pytest.raises(ConfigError, match="not float32"):
        open_runner(model_dir, "native", dtype="float32")


def test_without_the_library_torch_computes(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "why_not_native", lambda *_: "this CPU lacks amx_tile")
    runner, _ = open_runner(model_dir, "auto")
    assert isinstance(runner, TorchRunner)
    with pytest.raises(ConfigError, match="native cannot be used: this CPU lacks amx_tile"):
        open_runner(model_dir, "native")
    with pytest.raises(ConfigError, match="unknown kernels"):
        open_runner(model_dir, "magic")


def test_the_workers_option_offers_what_there_is() -> None:
    assert ("auto", "native", *dispatch.NAMES) == KERNELS


def test_why_a_library_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    amx = library.VARIANTS[0]
    flags = frozenset(amx.cpu_flags)
    with monkeypatch.context() as patch:
        patch.setattr(library.platform, "machine", lambda: "aarch64")
        assert "aarch64" in (library.why_not(amx) or "")
    if library.sys.platform != "linux" or library.platform.machine() != "x86_64":
        return
    monkeypatch.setattr(library, "_cpu_flags", lambda: flags - {"amx_bf16"})
    assert library.why_not(amx) == "this CPU lacks amx_bf16"
    monkeypatch.setattr(library, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(library, "library_path", lambda _: None)
    assert "C++20 compiler" in (library.why_not(amx) or "")
    broken = tmp_path / "_core.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "library_path", lambda _: broken)
    assert "cannot be loaded" in (library.why_not(amx) or "")


@pytest.mark.parametrize(
    ("lacking", "named", "used"),
    [
        ((), "", "amx"),
        (("amx",), "", "avx512"),
        ((), "avx512", "avx512"),
        (("amx",), "amx", None),
        (("amx", "avx512"), "", None),
        ((), "sse", None),
    ],
)
def test_which_library_is_used(
    lacking: tuple[str, ...], named: str, used: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why_not(variant: library.Variant) -> str | None:
        return f"no {variant.name}" if variant.name in lacking else None

    monkeypatch.setattr(library, "why_not", why_not)
    monkeypatch.setattr(library, "variant", library.variant.__wrapped__)
    monkeypatch.setenv(library.VARIABLE, named)
    chosen = library.variant()
    assert (None if chosen is None else chosen.name) == used
    if used is None:
        reason = library.unavailable() or ""
        assert reason == (
            f"no {lacking[-1]}" if lacking else "BATON_NATIVE is 'sse', not amx or avx512"
        )
    else:
        assert library.unavailable() is None


@needs_native
def test_a_library_of_another_version_is_not_called(
    native_variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_INTERFACE", -1)
    (used,) = (each for each in library.VARIANTS if each.name == native_variant)
    assert "install baton again" in (library.why_not(used) or "")
