"""Filters, penalties and masks against brute force and against transformers' processors."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.engine.batch import SampleRequest
from baton.engine.sampler import sample
from baton.kernels.noise import stream_start, uniform
from baton.types.request import SamplingParams


def ask(index: int = 0, **params: object) -> SampleRequest:
    return SampleRequest(SamplingParams(**params), index, stop_ids=())  # type: ignore[arg-type]


def draw(logits: torch.Tensor, requests: list[SampleRequest]) -> list[int]:
    return [token.token_id for token in sample(logits, requests)]


def warped(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution that transformers would sample from, `[vocab]` float64."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = processors(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())
    return scores[0].double().softmax(-1)


def expected_token(probs: torch.Tensor, numbers: torch.Tensor) -> int:
    """An exponential race in plain Python: token t arrives at -log(u) / p, the first one wins."""
    arrivals = {
        -math.log(number) / probability: token
        for token, (probability, number) in enumerate(
            zip(probs.tolist(), numbers.tolist(), strict=True)
        )
        if probability > 0
    }
    return arrivals[min(arrivals)]


@pytest.mark.parametrize("vocab", [2, 7, 300, 3000])
@pytest.mark.parametrize("seed", range(4))
def test_draws_match_transformers_distribution_exactly(vocab: int, seed: int) -> None:
    rng = random.Random(seed * 10_000 + vocab)
    generator = torch.Generator().manual_seed(seed)
    # Flat (0.1) needs more candidates than top-p looks at first; steep (5) needs a few.
    spread = rng.choice([0.1, 1.0, 5.0])
    logits = spread * torch.randn(40, vocab, generator=generator)
    requests = [
        ask(
            index=row,
            seed=seed,
            temperature=rng.choice([0.3, 1.0, 1.7]),
            top_k=rng.choice([0, 0, 1, 5, vocab, vocab + 5]),
            top_p=rng.choice([1.0, 0.95, 0.5, 0.01]),
            min_p=rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
        )
        for row in range(len(logits))
    ]
    tokens = draw(logits, requests)
    for row, (token, request) in enumerate(zip(tokens, requests, strict=True)):
        probs = warped(logits[row], request.params)
        assert token == expected_token(
            probs, uniform(stream_start(seed, row), torch.arange(vocab))
        ), request.params


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=str,
)
def test_frequencies_pass_a_chi_square_test(params: dict[str, float]) -> None:
    logits = torch.tensor([1.2, -0.5, 2.0, 0.3, 0.0, 1.9, -2.0, 0.9])
    count = 6000
    requests = [ask(index=i, seed=1234, **params) for i in range(count)]
    tokens = torch.tensor(draw(logits.expand(count, -1), requests))
    observed = torch.bincount(tokens, minlength=len(logits)).double()
    expected = count * warped(logits, requests[0].params)
    kept = expected > 0
    assert observed[~kept].sum() == 0
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 24.3  # 99.9 % quantile at 7 degrees of freedom, an upper bound for fewer


def test_equal_probabilities_stand_or_fall_together() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]).expand(300, -1)
    tokens = draw(logits, [ask(index=i, top_k=2) for i in range(300)])
    assert set(tokens) == {1, 2, 3}  # as transformers' and vLLM's top-k


def test_repetition_penalty_matches_transformers() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    prompt, output = (3, 3, 8, 49), (8, 20)
    context = torch.tensor([[*prompt, *output]])
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(context, logits.clone())
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, repetition_penalty=1.7, seed=5)
        mine = sample(logits, [SampleRequest(params, 2, (), prompt, output)])[0].token_id
        plain = SamplingParams(temperature=temperature, seed=5)
        assert mine == sample(theirs, [SampleRequest(plain, 2, ())])[0].token_id


def test_presence_and_frequency_count_the_answer_only() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])

    def best(prompt: tuple[int, ...], output: tuple[int, ...], **params: float) -> int:
        request = SampleRequest(
            SamplingParams(temperature=0.0, **params),  # type: ignore[arg-type]
            len(output),
            (),
            prompt,
            output,
        )
        return sample(logits, [request])[0].token_id

    assert best((0, 0, 0), (), presence_penalty=2.0) == 0
    assert best((), (0,), presence_penalty=1.5) == 1
    assert best((), (0, 0, 0), presence_penalty=0.5) == 0  # once, however often it was said
    assert best((), (0, 0, 0), frequency_penalty=0.5) == 1
    assert best((), (0, 0, 1), frequency_penalty=0.75) == 0  # 5 - 1.5 against 4 - 0.75
    assert best((), (0, 0, 1, 1), frequency_penalty=1.0, presence_penalty=0.5) == 2
    assert best((), (4,), presence_penalty=-4.5) == 4  # negative penalties encourage


def test_logit_bias() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.5]])
    assert draw(logits, [ask(temperature=0.0, logit_bias=((1, 3.0),))]) == [1]
    assert draw(logits, [ask(temperature=0.0, logit_bias=((0, -100.0), (2, -100.0)))]) == [1]


def test_min_tokens_masks_the_ends() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0]])
    params = SamplingParams(temperature=0.0, min_tokens=2)
    for index, expected in ((0, 2), (1, 2), (2, 0)):
        assert draw(logits, [SampleRequest(params, index, (0, 1))]) == [expected]
    biased = SamplingParams(temperature=0.0, min_tokens=1, logit_bias=((0, 100.0),))
    assert draw(logits, [SampleRequest(biased, 0, (0,))]) == [1]  # the mask has the last word
    sampled = SamplingParams(min_tokens=1, temperature=5.0)
    rows = [SampleRequest(sampled, 0, (0, 2)) for _ in range(50)]
    assert set(draw(logits.expand(50, -1), rows)) == {1}


def test_input_is_left_alone() -> None:
    logits = torch.randn(2, 30)
    before = logits.clone()
    request = SampleRequest(
        SamplingParams(repetition_penalty=2.0, logit_bias=((3, 9.0),), top_k=3), 0, (), (1, 2), ()
    )
    sample(logits, [request, ask(temperature=0.0)])
    assert torch.equal(logits, before)
