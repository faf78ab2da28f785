"""Greedy rows, the generator, independence of the batch, logprobs, bad logits."""

from __future__ import annotations

import hashlib

import pytest
import torch

from baton.engine.batch import SampleRequest
from baton.engine.sampler import sample
from baton.errors import InternalError
from baton.kernels.noise import stream_start, uniform
from baton.types.request import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
FIRST_NUMBERS = [0.4533620324306523, 0.6574925552387753]


def rows(count: int, vocab: int = 200) -> torch.Tensor:
    return 2 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(count))


def test_greedy_takes_the_best_and_the_lowest_id_on_ties() -> None:
    logits = torch.tensor([[0.0, 7.0, 7.0, 1.0], [-1.0, -3.0, -2.0, -1.0], [0.0, 0.0, 0.0, 0.1]])
    tokens = sample(logits, [SampleRequest(GREEDY, i, ()) for i in range(3)])
    assert [(t.token_id, t.index) for t in tokens] == [(1, 0), (0, 1), (3, 2)]


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, 10), []) == []


def test_tiny_temperature_is_greedy() -> None:
    logits = 1000 * rows(5)
    params = SamplingParams(temperature=1e-9)
    tokens = sample(logits, [SampleRequest(params, i, ()) for i in range(5)])
    assert [t.token_id for t in tokens] == logits.argmax(-1).tolist()


def test_a_row_depends_on_nothing_but_itself() -> None:
    logits = rows(6)
    requests = [
        SampleRequest(GREEDY, 0, ()),
        SampleRequest(SamplingParams(seed=1, top_p=0.8), 4, ()),
        SampleRequest(SamplingParams(temperature=0.0, repetition_penalty=9.0), 1, (), (5,), (6,)),
        SampleRequest(SamplingParams(seed=3, temperature=3.0), 0, ()),
        SampleRequest(SamplingParams(seed=3, min_p=0.1, logprobs=3), 9, ()),
        SampleRequest(SamplingParams(seed=2**64 - 1, top_k=7, frequency_penalty=1.0), 7, ()),
    ]
    together = sample(logits, requests)
    alone = [sample(logits[i : i + 1], [requests[i]])[0] for i in range(6)]
    assert together == alone
    backwards = sample(logits.flip(0), requests[::-1])
    assert backwards[::-1] == together


def test_an_interrupted_answer_continues_the_same() -> None:
    """Sampling index i anew, elsewhere, gives what an uninterrupted run gave."""
    logits = rows(30)
    params = SamplingParams(seed=77, temperature=1.3, top_p=0.9)
    whole = [sample(logits[i : i + 1], [SampleRequest(params, i, ())])[0] for i in range(30)]
    resumed = sample(logits[12:], [SampleRequest(params, i, ()) for i in range(12, 30)])
    assert resumed == whole[12:]
    other = SamplingParams(seed=78, temperature=1.3, top_p=0.9)
    assert sample(logits, [SampleRequest(other, i, ()) for i in range(30)]) != whole


def documented_number(seed: int, index: int, token: int) -> float:
    """SplitMix64 on Python's integers."""
    key = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    start = hashlib.blake2b(key, digest_size=8, person=b"baton.sample").digest()
    bits = (int.from_bytes(start, "little") + (token + 1) * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    bits ^= bits >> 31
    return ((bits >> 12) + 0.5) * 2.0**-52


def test_generator_is_the_documented_one() -> None:
    """These values are a contract between processes and versions."""
    for seed, index in ((0, 0), (0, 1), (1, 0), (2**64 - 1, 10**6), (2**63, 7)):
        numbers = uniform(stream_start(seed, index), torch.arange(200)).tolist()
        assert numbers == [documented_number(seed, index, token) for token in range(200)]
    assert uniform(stream_start(0, 0), torch.arange(2)).tolist() == FIRST_NUMBERS


def test_generator_is_uniform_over_seeds_indices_and_tokens() -> None:
    for values in (
        torch.cat([uniform(stream_start(9, index), torch.arange(1)) for index in range(4000)]),
        torch.cat([uniform(stream_start(seed, 3), torch.arange(1)) for seed in range(4000)]),
        uniform(stream_start(5, 5), torch.arange(4000)),
    ):
        assert values.min() > 0
        assert values.max() < 1
        observed = torch.histc(values, bins=20, min=0, max=1)
        chi_square = ((observed - 200) ** 2 / 200).sum()
        assert chi_square < 43.8  # 99.9 % quantile at 19 degrees of freedom
        neighbours = torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1]
        assert abs(neighbours) < 0.06


def test_rounding_hardly_ever_changes_a_token() -> None:
    """Two workers' logits differ by rounding; their tokens must not, for all practical purposes."""
    logits = rows(2000)
    requests = [SampleRequest(SamplingParams(seed=3), i, ()) for i in range(len(logits))]
    noise = 1e-5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    assert sample(logits + noise, requests) == sample(logits, requests)


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf, 0.0, -torch.inf]])
    requests = [SampleRequest(SamplingParams(seed=4), i, ()) for i in range(500)]
    drawn = {token.token_id for token in sample(logits.expand(500, -1), requests)}
    assert drawn == {0, 1, 3}


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = rows(2)
    params = SamplingParams(
        temperature=0.0, logprobs=3, logit_bias=((17, 100.0),), repetition_penalty=1.5
    )
    first, second = sample(
        logits, [SampleRequest(params, 0, (), (1,), (2,)), SampleRequest(GREEDY, 0, ())]
    )
    assert second.logprob is None
    assert first.token_id == 17
    assert first.logprob is not None
    raw = logits[0].double().log_softmax(-1)
    assert first.logprob.logprob == pytest.approx(raw[17].item(), abs=1e-5)
    best = raw.topk(3)
    assert [token for token, _ in first.logprob.top] == best.indices.tolist()
    assert [value for _, value in first.logprob.top] == pytest.approx(
        best.values.tolist(), abs=1e-5
    )


@pytest.mark.parametrize(("count", "expected"), [(0, []), (2, [1, 3]), (4, [1, 3, 4, 0])])
def test_logprobs_order_ties_by_id(count: int, expected: list[int]) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0, 2.0, 2.0]])
    params = SamplingParams(temperature=0.0, logprobs=count)
    token = sample(logits, [SampleRequest(params, 0, ())])[0]
    assert token.logprob is not None
    assert [token for token, _ in token.logprob.top] == expected


def test_more_logprobs_than_tokens() -> None:
    params = SamplingParams(temperature=0.0, logprobs=20)
    token = sample(torch.zeros(1, 3), [SampleRequest(params, 0, ())])[0]
    assert token.logprob is not None
    assert len(token.logprob.top) == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1, top_p=0.5)])
def test_bad_logits_are_an_error(bad: float, params: SamplingParams) -> None:
    logits = rows(3)
    logits[1, 50] = bad
    with pytest.raises(InternalError, match="not finite"):
        sample(logits, [SampleRequest(params, 0, ()) for _ in range(3)])


def test_a_row_with_everything_masked_is_an_error() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=5)
    with pytest.raises(InternalError, match="not finite"):
        sample(torch.zeros(1, 2), [SampleRequest(params, 0, (0, 1))])
