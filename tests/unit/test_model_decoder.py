"""The decoder against transformers: every family, any chunking, any company."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from baton.demo import demo_model_path
from baton.engine.batch import Batch, BatchItem
from baton.model.spec import load_spec
from baton.tokenizer import load_tokenizer
from tests.models import EOS_TOKEN_ID, FAMILIES, VOCAB_SIZE, make_tiny_model
from tests.unit.runners import PlainDecoder, open_runner, request, sharing, teacher_forced


def reference(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def random_prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_match_transformers(family: str, block_size: int, tmp_path: Path) -> None:
    make_tiny_model(family, tmp_path)
    model = reference(tmp_path)
    prompts = [random_prompt(length, seed=length) for length in (1, 6, 40, 129, 300)]
    sequences = teacher_forced(PlainDecoder(tmp_path, block_size, 64, "float32"), prompts, 5, 7)
    for sequence in sequences:
        with torch.inference_mode():
            expected = model(torch.tensor([sequence.tokens])).logits[0]
        assert len(sequence.logits) >= min(5, len(sequence.tokens))
        for position, logits in sequence.logits.items():
            assert (logits - expected[position]).abs().max() < 1e-4


def test_logits_match_over_a_long_context(tmp_path: Path) -> None:
    make_tiny_model("llama3", tmp_path)
    prompts = [random_prompt(2000, seed=1)]
    (sequence,) = teacher_forced(PlainDecoder(tmp_path, 32, 64, "float32"), prompts, 3, 1)
    with torch.inference_mode():
        expected = reference(tmp_path)(torch.tensor([sequence.tokens])).logits[0]
    worst = max((row - expected[at]).abs().max() for at, row in sequence.logits.items())
    assert worst < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_can_be_read_in_the_step_that_computes_it(family: str, tmp_path: Path) -> None:
    make_tiny_model(family, tmp_path)
    prompts = [random_prompt(32, 1) + random_prompt(own, own) for own in (20, 9)]
    rows = PlainDecoder(tmp_path, 16, 6, "float32").logits(sharing(*prompts))
    for tokens, row in zip(prompts, rows, strict=True):
        with torch.inference_mode():
            expected = reference(tmp_path)(torch.tensor([tokens])).logits[0, -1]
        assert (row - expected).abs().max() < 1e-4


def test_logits_of_the_demo_model_match() -> None:
    """Trained weights: activations are far larger than random ones'."""
    text = (Path(random.__file__)).read_text()[:4000]
    tokens = load_tokenizer(demo_model_path()).encode(text)[:900]
    plain = PlainDecoder(demo_model_path(), 32, 40, "float32")
    (sequence,) = teacher_forced(plain, [tokens], 20, 3)
    with torch.inference_mode():
        expected = reference(demo_model_path())(torch.tensor([sequence.tokens])).logits[0]
    worst = max((row - expected[at]).abs().max() for at, row in sequence.logits.items())
    assert worst < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_match_generate(family: str, tmp_path: Path) -> None:
    make_tiny_model(family, tmp_path, seed=5)
    model, steps = reference(tmp_path), 24
    prompts = [random_prompt(length, seed=length) for length in (3, 47, 150)]
    runner, _ = open_runner(tmp_path)
    answers: list[list[int]] = [[] for _ in prompts]
    blocks = [tuple(range(16 * i, 16 * i + 16)) for i in range(len(prompts))]
    items = [BatchItem(i, tuple(p), 0, blocks[i], request()) for i, p in enumerate(prompts)]
    for step in range(steps):
        result = runner.launch(Batch(step, tuple(items))).wait()
        items = []
        for i, sampled in enumerate(result.tokens):
            assert sampled is not None
            answers[i].append(sampled.token_id)
            start = len(prompts[i]) + step
            items.append(BatchItem(i, (sampled.token_id,), start, blocks[i], request()))
    for prompt, answer in zip(prompts, answers, strict=True):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=steps,
        )
        expected = output[0, len(prompt) :].tolist()
        if EOS_TOKEN_ID in answer:
            answer = answer[: answer.index(EOS_TOKEN_ID) + 1]
        assert answer == expected


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_bfloat16_is_close_to_float32(family: str, tmp_path: Path) -> None:
    make_tiny_model(family, tmp_path, dtype="bfloat16")
    assert load_spec(tmp_path).dtype == "bfloat16"
    prompts = [random_prompt(60, seed=2)]
    (ours,) = teacher_forced(PlainDecoder(tmp_path, 16, 8, "bfloat16"), prompts, 4, 3)
    with torch.inference_mode():
        exact = reference(tmp_path)(torch.tensor([ours.tokens])).logits[0]
        theirs = reference(tmp_path, torch.bfloat16)(torch.tensor([ours.tokens])).logits[0]
    for position, logits in ours.logits.items():
        error = (logits - exact[position]).abs().mean()
        assert error < 0.1
        assert error < 2 * (theirs[position].float() - exact[position]).abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_decisive_and_look_far_back(family: str, tmp_path: Path) -> None:
    """What other tests rely on: the best token leads clearly, and early context matters."""
    make_tiny_model(family, tmp_path)
    model = reference(tmp_path)
    prompts = torch.tensor([random_prompt(200, seed=seed) for seed in range(8)])
    changed = prompts.clone()
    changed[:, 40:56] = torch.tensor([random_prompt(16, seed=99)])
    with torch.inference_mode():
        logits, other = model(prompts).logits, model(changed).logits
        exact = model.double()(prompts).logits
    best = logits.topk(2, dim=-1)
    gaps = best.values[..., 0] - best.values[..., 1]
    assert (gaps < 1e-4).float().mean() < 1e-3
    assert gaps.mean() > 0.5
    assert (logits - exact).pow(2).mean().sqrt() < 1e-5  # rounding is far below the gaps
    later = slice(70, 130)
    differs = best.indices[:, later, 0] != other[:, later].argmax(dim=-1)
    assert differs.float().mean() > 0.1
