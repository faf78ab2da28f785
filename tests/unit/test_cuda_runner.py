"""The runner with a queue, on a host that stands in for one: recordings, padding, tokens that stay
on the device. Its answers are the plain runner's, token for token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.engine.batch import Batch, BatchItem, SampleRequest
from baton.engine.cuda_runner import CudaRunner
from baton.engine.graph_backend import HostBackend
from baton.errors import InternalError
from tests.graph_kit import (
    MIXED,
    PROMPTS,
    Sampling,
    StrictBackend,
    answers_in_flight,
    answers_one_by_one,
    open_cuda_runner,
    prompt_item,
)
from tests.models import make_tiny_model
from tests.unit.runners import open_runner, request, sharing

KERNELS = ["reference", "triton"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    return make_tiny_model("qwen3", path, max_len=96, num_hidden_layers=2)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton compiles here: tests/gpu runs this on the GPU")
    return str(request.param)


@pytest.fixture
def runner(model_dir: Path, kernels: str) -> Iterator[CudaRunner]:
    # The reference kernels read lengths on the host; Triton's must not.
    backend = StrictBackend() if kernels == "triton" else HostBackend()
    runner = open_cuda_runner(model_dir, backend, kernels, buckets=(1, 4))
    runner.warm_up()
    yield runner
    runner.close()


@pytest.mark.parametrize("sampling", MIXED, ids=lambda sampling: sampling.name)
def test_steps_in_flight_give_the_plain_runner_s_tokens(
    runner: CudaRunner, model_dir: Path, sampling: Sampling
) -> None:
    plain, _ = open_runner(model_dir)
    expected = answers_one_by_one(plain, PROMPTS, sampling, steps=5)
    assert answers_in_flight(runner, PROMPTS, sampling, steps=5) == expected


@pytest.mark.parametrize("family", ["mistral", "llama-bias"])
def test_families(family: str, kernels: str, tmp_path: Path) -> None:
    make_tiny_model(family, tmp_path, max_len=96, num_hidden_layers=2)
    plain, _ = open_runner(tmp_path)
    runner = open_cuda_runner(tmp_path, HostBackend(), kernels, buckets=(4,))
    runner.warm_up()
    expected = answers_one_by_one(plain, PROMPTS, MIXED[0], steps=4)
    assert answers_in_flight(runner, PROMPTS, MIXED[0], steps=4) == expected


def test_more_rows_than_are_recorded(model_dir: Path, kernels: str) -> None:
    plain, _ = open_runner(model_dir)
    runner = open_cuda_runner(model_dir, HostBackend(), kernels, buckets=(2,))
    runner.warm_up()
    expected = answers_one_by_one(plain, PROMPTS, MIXED[1], steps=4)
    assert answers_in_flight(runner, PROMPTS, MIXED[1], steps=4) == expected


def test_rows_change_places_and_blocks(runner: CudaRunner, model_dir: Path) -> None:
    """Tables are sent when they change only: another sequence in a row, one more block."""
    plain, _ = open_runner(model_dir)
    first, second = PROMPTS[0][:15], PROMPTS[1][:15]
    for one in (plain, runner):
        one.launch(Batch(0, (prompt_item(1, first, (3, 4)), prompt_item(2, second, (9, 8))))).wait()
    order = [((1, (3,), 14), (2, (9,), 14)), ((2, (9,), 14), (1, (3,), 14)), ((1, (3, 4), 15),)]
    for step, rows in enumerate(order):
        items = tuple(
            BatchItem(number, (40 + start,), start, blocks, request(index=step))
            for number, blocks, start in rows
        )
        batch = Batch(step, items)
        assert runner.launch(batch).wait() == plain.launch(batch).wait()


def test_a_prefix_can_be_read_in_the_step_that_computes_it(
    runner: CudaRunner, model_dir: Path
) -> None:
    plain, _ = open_runner(model_dir)
    prompt, other = PROMPTS[0], (*PROMPTS[0][:32], *PROMPTS[1])
    alone = [
        plain.launch(Batch(0, (prompt_item(0, one, (0, 1, 2, 3)),))) for one in (prompt, other)
    ]
    expected = tuple(step.wait().tokens[0] for step in alone)
    assert runner.launch(Batch(0, sharing(prompt, other))).wait().tokens == expected


def test_warm_up_leaves_the_pool_zeroed(runner: CudaRunner) -> None:
    resources = runner._resources
    assert resources is not None
    assert not resources.kv.any()


@pytest.mark.parametrize(("layer_groups", "ends"), [(1, [2]), (2, [1, 2])])
def test_layers_are_announced_in_groups_by_wait(
    layer_groups: int, ends: list[int], model_dir: Path
) -> None:
    runner = open_cuda_runner(
        model_dir, HostBackend(), "reference", buckets=(1,), layer_groups=layer_groups
    )
    runner.warm_up()
    calls: list[int] = []
    chunk = Batch(0, (prompt_item(1, PROMPTS[0], (0, 1, 2, 3)),))
    launched = runner.launch(chunk, calls.append)
    assert calls == []
    launched.wait()
    assert calls == ends
    calls.clear()
    decode = BatchItem(1, (7,), len(PROMPTS[0]), (0, 1, 2, 3), request(index=1))
    runner.launch(Batch(1, (decode,)), calls.append).wait()
    assert calls == [2]


def test_rows_that_nobody_asks_for(runner: CudaRunner) -> None:
    quiet = prompt_item(1, PROMPTS[0], (0, 1, 2, 3))._replace(sample=None)
    assert runner.launch(Batch(0, (quiet,))).wait().tokens == (None,)
    one = BatchItem(1, (5,), len(PROMPTS[0]), (0, 1, 2, 3), None)
    two = BatchItem(2, (6,), 0, (9,), request())
    nothing, token = runner.launch(Batch(1, (one, two))).wait().tokens
    assert nothing is None
    assert token is not None


def test_following_a_token_that_was_not_sampled_is_an_error(runner: CudaRunner) -> None:
    item = BatchItem(1, (), 5, (0,), request(index=1), follows=True)
    with pytest.raises(InternalError, match="follows a token that was not sampled"):
        runner.launch(Batch(0, (item,)))


def test_nan_is_an_error_not_garbage(kernels: str, tmp_path: Path) -> None:
    make_tiny_model("llama", tmp_path, max_len=96, num_hidden_layers=2)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(InternalError, match="not finite"):
        open_cuda_runner(tmp_path, HostBackend(), kernels, buckets=(1,)).warm_up()


def test_reading_on_the_host_while_recording_is_noticed(model_dir: Path) -> None:
    runner = open_cuda_runner(model_dir, StrictBackend(), "reference", buckets=(1,))
    with pytest.raises(AssertionError, match="kv_write reads values on the host"):
        runner.warm_up()


def test_close_is_idempotent(runner: CudaRunner) -> None:
    runner.close()
    runner.close()
    with pytest.raises(InternalError, match="closed"):
        runner.launch(Batch(0, (BatchItem(1, (5,), 0, (0,), request()),)))


def test_requests_that_only_the_host_can_sample(runner: CudaRunner, model_dir: Path) -> None:
    """Logprobs come with the token, and a row beside it is sampled on the device."""
    plain, _ = open_runner(model_dir)
    wanted = SampleRequest(MIXED[4].params[0], 0, ())
    items = (
        BatchItem(1, (5,), 0, (0,), wanted),
        BatchItem(2, (6,), 0, (1,), request()),
    )
    ours, theirs = (one.launch(Batch(0, items)).wait().tokens for one in (runner, plain))
    assert ours[1] == theirs[1]
    assert ours[0] is not None
    assert theirs[0] is not None
    assert ours[0].token_id == theirs[0].token_id
