"""The runner on a GPU: recorded against not recorded, in flight against one by one, tokens against
transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.engine.batch import Batch, BatchItem
from baton.engine.graph_backend import CudaBackend
from baton.engine.graphs import BUCKETS
from tests.graph_kit import (
    GREEDY,
    MIXED,
    PROMPTS,
    Sampling,
    answers_in_flight,
    answers_one_by_one,
    open_cuda_runner,
    prompt_item,
    random_prompt,
)
from tests.models import EOS_TOKEN_ID, FAMILIES, make_tiny_model

pytestmark = pytest.mark.gpu


class EagerBackend(CudaBackend):
    """CUDA without graphs: a recording is the function itself."""

    def record(self, step):  # type: ignore[no-untyped-def]
        step()
        return step


@pytest.mark.parametrize("sampling", MIXED, ids=lambda sampling: sampling.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_steps_in_flight_agree_with_eager_ones(
    sampling: Sampling, dtype: str, tmp_path: Path
) -> None:
    """To the token, and in bfloat16 too: it is the same kernels over the same rows, padded."""
    make_tiny_model("qwen3", tmp_path, max_len=256)
    eager = open_cuda_runner(tmp_path, EagerBackend("cuda"), "triton", (4,), dtype=dtype)
    recorded = open_cuda_runner(tmp_path, CudaBackend("cuda"), "triton", (4,), dtype=dtype)
    eager.warm_up()
    recorded.warm_up()
    expected = answers_one_by_one(eager, PROMPTS, sampling, steps=30)
    assert answers_one_by_one(recorded, PROMPTS, sampling, steps=30) == expected
    assert answers_in_flight(recorded, PROMPTS, sampling, steps=30) == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_greedy_tokens_match_transformers(family: str, kernels: str, tmp_path: Path) -> None:
    """Reference kernels read lengths on the host, so they can only run unrecorded."""
    make_tiny_model(family, tmp_path, seed=5, max_len=256)
    backend = CudaBackend("cuda") if kernels == "triton" else EagerBackend("cuda")
    runner = open_cuda_runner(tmp_path, backend, kernels, (4,))
    runner.warm_up()
    answers = answers_in_flight(runner, PROMPTS, MIXED[0], steps=24)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().cuda()
    for prompt, answer in zip(PROMPTS, answers[:-1], strict=True):
        output = model.generate(
            torch.tensor([prompt], device="cuda"),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device="cuda"),
            do_sample=False,
            max_new_tokens=24,
        )
        expected = output[0, len(prompt) :].tolist()
        if EOS_TOKEN_ID in answer:
            answer = answer[: answer.index(EOS_TOKEN_ID) + 1]
        assert answer == expected


def test_every_bucket_gives_the_same_row(tmp_path: Path) -> None:
    """One sequence among more and more copies of itself: rows do not see one another."""
    make_tiny_model("qwen3", tmp_path, max_len=256)
    runner = open_cuda_runner(tmp_path, CudaBackend("cuda"), "triton", BUCKETS)
    runner.warm_up()
    runner.launch(Batch(0, (prompt_item(1, PROMPTS[0], (0, 1, 2)),))).wait()
    asked = prompt_item(1, (7,), (0, 1, 2)).sample
    item = BatchItem(1, (7,), len(PROMPTS[0]), (0, 1, 2), asked)
    seen = set()
    for count in (1, 2, 3, 7, 16, 20, 33, 100, 256, 257):
        # Copies write the same KV to the same slot; that slots repeat does no harm here.
        tokens = runner.launch(Batch(1, (item,) * count)).wait().tokens
        assert len(tokens) == count
        seen.update(token.token_id for token in tokens if token is not None)
    assert len(seen) == 1


def test_layers_are_final_when_they_are_announced(tmp_path: Path) -> None:
    """What `wait` announces can be read by another stream at once."""
    make_tiny_model("qwen3", tmp_path, max_len=2304)
    runner = open_cuda_runner(tmp_path, CudaBackend("cuda"), "triton", (1,), layer_groups=4)
    runner.warm_up()
    resources = runner._resources
    assert resources is not None
    seen: list[int] = []

    def announced(layer_end: int) -> None:
        layer = resources.kv[:60, layer_end - 1].cpu()  # on the default stream
        assert layer.flatten(1).any(dim=1).all()
        seen.append(layer_end)

    prompt = random_prompt(960, seed=9)
    item = prompt_item(1, prompt, tuple(range(60)), GREEDY)
    runner.launch(Batch(0, (item,)), announced).wait()
    assert seen == [1, 2, 3, 4]


def test_a_step_is_queued_without_waiting(tmp_path: Path) -> None:
    """No synchronization on the way: torch raises where it would have to wait for the device."""
    make_tiny_model("qwen3", tmp_path, max_len=256)
    runner = open_cuda_runner(tmp_path, CudaBackend("cuda"), "triton", (4,))
    runner.warm_up()
    expected = answers_one_by_one(runner, PROMPTS, MIXED[1], steps=6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert answers_in_flight(runner, PROMPTS, MIXED[1], steps=6) == expected
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flash_prefill_agrees_with_triton(tmp_path: Path) -> None:
    """Where torch's FlashAttention reads blocks of this size; some of its builds need 256."""
    make_tiny_model("mistral", tmp_path, max_len=256)
    expected = open_cuda_runner(tmp_path, CudaBackend("cuda"), "triton", (4,), dtype="bfloat16")
    expected.warm_up()
    runner = open_cuda_runner(tmp_path, CudaBackend("cuda"), "flash", (4,), dtype="bfloat16")
    try:
        runner.warm_up()
    except RuntimeError as error:
        pytest.skip(f"torch's FlashAttention cannot read this pool: {error}")
    ours, theirs = (
        answers_in_flight(one, PROMPTS, MIXED[0], steps=3) for one in (runner, expected)
    )
    assert [answer[0] for answer in ours] == [answer[0] for answer in theirs]
