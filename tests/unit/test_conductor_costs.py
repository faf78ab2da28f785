"""Costs are learned from samples, stay sane whatever is reported, and say when they are guesses."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types.fleet import Role
from baton.types.kv_events import Tier
from baton.types.request import Span
from conductor.cost_fit import CostModel, NonNegativeFit, WorkerSamples
from conductor.cost_model import MIN_SAMPLES, DecodeCost, PrefillCost, TransferCosts
from tests.fake_worker import worker_info

SLOW_CPU = PrefillCost(0.01, 2e-3, 5e-8)


def begin(model: CostModel | None = None, name: str = "p0") -> WorkerSamples:
    return (model or CostModel()).begin(worker_info(name, Role.PREFILL))


def report(samples: WorkerSamples, truth: PrefillCost, count: int, seed: int = 1) -> None:
    draw = random.Random(seed)
    now = 1000.0
    for _ in range(count):
        tokens = int(10 ** draw.uniform(1, 4.5))
        context = draw.choice([0, 0, int(10 ** draw.uniform(1, 4.5))])
        seconds = truth.seconds(tokens, context) * draw.uniform(0.97, 1.03)
        samples.add_prefill(tokens, context, Span("prefill", now, now + seconds))
        now += seconds + 1.0


@pytest.mark.parametrize("truth", [SLOW_CPU, PrefillCost(5e-3, 3e-5, 1.5e-9)])
def test_prefill_costs_are_learned(truth: PrefillCost) -> None:
    samples = begin()
    assert samples.cost().prefill.is_prior
    report(samples, truth, 60)
    cost = samples.cost().prefill
    assert not cost.is_prior
    for tokens, context in [(20, 0), (512, 0), (512, 8000), (8000, 0), (30000, 1000)]:
        assert cost.seconds(tokens, context) == pytest.approx(
            truth.seconds(tokens, context), rel=0.2
        )


def test_what_was_never_seen_stays_in_proportion() -> None:
    samples = begin()
    for second in range(20):
        seconds = 100 * PrefillCost().seconds(64)
        samples.add_prefill(64, 0, Span("prefill", 20.0 * second, 20.0 * second + seconds))
    long = samples.cost().prefill.seconds(8000, 8000) / PrefillCost().seconds(8000, 8000)
    assert 50 < long < 200


LONG = 113_000
# Of a small model on a fast GPU, one of 70B, and one on a CPU, with attention as efficient as
# products, less so, and more so.
SHAPES = [
    (PrefillCost(5e-3, 4e-6, 2.4e-10), 6e-5),
    (PrefillCost(2e-2, 8e-5, 2.4e-9), 2e-5),
    (PrefillCost(1e-2, 2e-3, 8e-9), 5e-6),
]


def of_length(samples: WorkerSamples, truth: PrefillCost, tokens: Iterable[int], seed: int) -> None:
    draw, now = Random(seed), 1000.0 * seed
    for length in tokens:
        seconds = truth.seconds(length) * draw.uniform(0.95, 1.05)
        samples.add_prefill(length, 0, Span("prefill", now, now + seconds))
        now += seconds + 1.0


def shape(pair_to_token: float) -> WorkerSamples:
    info = worker_info("p0", Role.PREFILL, pair_to_token=pair_to_token)
    return CostModel().begin(info)


def short_prompts(seed: int, count: int = 80) -> list[int]:
    draw = Random(seed)
    return [round(64 * (4000 / 64) ** draw.random()) for _ in range(count)]


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(("truth", "pair_to_token"), SHAPES)
def test_short_prompts_tell_of_long_ones(
    truth: PrefillCost, pair_to_token: float, seed: int
) -> None:
    samples = shape(pair_to_token)
    of_length(samples, truth, short_prompts(seed), seed)
    assert samples.cost().prefill.seconds(LONG) == pytest.approx(truth.seconds(LONG), rel=0.3)


def test_attention_is_not_lost_in_what_short_prompts_take_more_than_the_model_says() -> None:
    """Small batches keep a device less busy, and so do products of few rows."""
    samples, draw, now = shape(2e-5), Random(1), 0.0
    for tokens in short_prompts(1):
        idle = 0.5 * math.exp(-tokens / 1000)
        seconds = 2e-2 + 8e-5 * tokens * (1 + idle) * draw.uniform(0.9, 1.1)
        samples.add_prefill(tokens, 0, Span("prefill", now, now + seconds))
        now += 9.0
    truth = PrefillCost(2e-2, 8e-5, 1.6e-9)
    assert samples.cost().prefill.seconds(LONG) == pytest.approx(truth.seconds(LONG), rel=0.3)


@pytest.mark.parametrize("times", [0.2, 5.0])
def test_long_prompts_correct_what_was_assumed_of_attention(times: float) -> None:
    samples, truth = shape(2e-5), PrefillCost(2e-2, 8e-5, 1.6e-9 * times)
    of_length(samples, truth, short_prompts(1), seed=1)
    of_length(samples, truth, [LONG // 4, LONG // 2, LONG] * 4, seed=2)
    cost = samples.cost().prefill
    for tokens in (500, 4000, LONG):
        assert cost.seconds(tokens) == pytest.approx(truth.seconds(tokens), rel=0.2)


def test_one_slow_prefill_does_not_change_the_picture() -> None:
    samples = begin()
    report(samples, SLOW_CPU, 40)
    before = samples.cost().prefill.seconds(1000)
    samples.add_prefill(1000, 0, Span("prefill", 9e8, 9e8 + 3000))
    assert samples.cost().prefill.seconds(1000) < 1.5 * before


def test_costs_follow_a_worker_that_has_become_slower() -> None:
    samples = begin()
    report(samples, PrefillCost(0.01, 1e-3, 0.0), 40)
    for second in range(60):
        samples.add_prefill(1000, 0, Span("prefill", 1e9 + 9 * second, 1e9 + 9 * second + 3.0))
    assert samples.cost().prefill.seconds(1000) == pytest.approx(3.0, rel=0.2)


def test_prompts_that_waited_for_one_another_count_by_their_own_time() -> None:
    samples = begin()
    for batch in range(MIN_SAMPLES):
        at = 100.0 * batch
        samples.add_prefill(1000, 0, Span("prefill", at, at + 2.0))
        samples.add_prefill(1000, 0, Span("prefill", at + 0.1, at + 4.0))  # began, then waited
        samples.add_prefill(1000, 0, Span("prefill", at - 9.0, at + 1.0))  # told of late
    assert samples.cost().prefill.seconds(1000) == pytest.approx(2.0, rel=0.1)


def test_a_prompt_that_was_overtaken_tells_nothing_by_itself() -> None:
    samples, truth = begin(), PrefillCost(0.0, 1e-3, 0.0)
    for batch in range(2 * MIN_SAMPLES):
        at = 100.0 * batch
        for began, ended in ((2.0, 3.0), (4.0, 5.0)):  # the short ones that overtake it
            samples.add_prefill(1000, 0, Span("prefill", at + began, at + ended))
        samples.add_prefill(9000, 0, Span("prefill", at, at + 11.0))
    assert samples.cost().prefill.seconds(9000) == pytest.approx(truth.seconds(9000), rel=0.05)


def test_a_prompt_that_was_overtaken_took_the_time_of_its_steps() -> None:
    samples = begin()
    for batch in range(2 * MIN_SAMPLES):
        at = 100.0 * batch
        samples.add_prefill(0, 1000, Span("prefill", at + 2.0, at + 3.0))  # tells nothing itself
        took = (("compute_us", 9_000_000),)
        samples.add_prefill(9000, 0, Span("prefill", at, at + 90.0, took))
    assert samples.cost().prefill.samples == 2 * MIN_SAMPLES
    assert samples.cost().prefill.seconds(9000) == pytest.approx(9.0, rel=0.05)


def test_prompts_that_share_steps_share_their_time() -> None:
    """Steps of 64 tokens, prompts of 48: two of four end with the same step."""
    samples, at = begin(), 0.0
    for _ in range(4 * MIN_SAMPLES):
        for ends in (1, 1, 2):
            for _ in range(ends):
                samples.add_prefill(48, 0, Span("prefill", at - 0.1, at + 0.15))
            at += 0.15
    cost = samples.cost().prefill
    assert cost.seconds(48) == pytest.approx(0.1125, rel=0.05)
    assert cost.samples >= 3 * MIN_SAMPLES


@pytest.mark.parametrize("told_first", ["short", "long"])
def test_a_short_prompt_in_a_long_ones_last_step_does_not_make_it_quick(told_first: str) -> None:
    samples, truth, now = begin(), PrefillCost(2e-2, 8e-5, 1.6e-9), 0.0
    prompts = {"long": (60_000, 0.0), "short": (500, 0.9)}  # and when they come, of the time
    for _ in range(2 * MIN_SAMPLES):
        seconds = truth.seconds(60_000) + truth.seconds(500)
        for name in sorted(prompts, reverse=told_first == "short"):
            tokens, began = prompts[name]
            samples.add_prefill(tokens, 0, Span("prefill", now + began * seconds, now + seconds))
        now += seconds + 1.0
    cost = samples.cost().prefill
    assert cost.seconds(60_000) == pytest.approx(truth.seconds(60_000), rel=0.05)


def test_batches_that_are_alike_do_not_make_others_forgotten() -> None:
    samples, truth = begin(), DecodeCost(0.04, 0.004)
    for running in range(1, 20):
        samples.add_steps(running, truth.seconds(running))
    for _ in range(200):
        samples.add_steps(4.0, truth.seconds(4))
    assert samples.cost().decode.seconds(16) == pytest.approx(truth.seconds(16), rel=0.2)
    for _ in range(200):
        samples.add_steps(4.0, 3 * truth.seconds(4))
    assert samples.cost().decode.seconds(4) == pytest.approx(3 * truth.seconds(4), rel=0.05)


def test_a_new_worker_is_judged_by_those_that_are_like_it() -> None:
    model = CostModel()
    report(begin(model), SLOW_CPU, 30)
    newcomer = begin(model, "p1").cost().prefill
    assert not newcomer.is_prior
    assert newcomer.seconds(1000) == pytest.approx(SLOW_CPU.seconds(1000), rel=0.2)
    other = model.begin(worker_info("p2", Role.PREFILL, device="cuda")).cost().prefill
    assert other.is_prior


def test_decode_steps_are_learned() -> None:
    samples = begin()
    truth = DecodeCost(0.05, 0.002)
    for number in range(64):
        running = 1 + number % 32
        samples.add_steps(running, truth.seconds(running))
    cost = samples.cost().decode
    assert not cost.is_prior
    assert cost.seconds(8) == pytest.approx(truth.seconds(8), rel=0.05)
    assert cost.seconds(64) == pytest.approx(truth.seconds(64), rel=0.1)


def test_transfers_are_learned_by_tier_and_distance() -> None:
    model = CostModel()
    assert model.transfers() == TransferCosts()
    for size in range(1, 40):
        model.add_fetch(Tier.NVME, True, size << 20, 0.01 + (size << 20) / 1e9)
    fetch = model.transfers().fetch(Tier.NVME, True)
    assert fetch.seconds(100 << 20) == pytest.approx(0.01 + (100 << 20) / 1e9, rel=0.1)
    assert model.transfers().fetch(Tier.NVME, False).is_prior
    assert fetch.seconds(0) == 0.0


def test_estimates_are_corrected_by_what_came_of_them() -> None:
    model = CostModel()
    assert model.ttft_factor == 1.0
    for _ in range(100):
        model.add_ttft(0.1, 0.2)
    assert model.ttft_factor == pytest.approx(2.0, rel=0.05)
    model.add_ttft(0.1, 3600.0)
    model.add_ttft(0.0, 1.0)
    assert model.ttft_factor < 3.0


numbers = st.one_of(
    st.floats(), st.sampled_from([0.0, -1.0, 1e-300, 1e300, math.inf]), st.floats(0, 1e6)
)


@given(st.lists(st.tuples(numbers, numbers, numbers), max_size=30))
def test_no_report_makes_a_cost_negative_or_nan(samples: list[tuple[float, ...]]) -> None:
    fit = NonNegativeFit((1e-3, 1e-6))
    for one, two, seconds in samples:
        fit.add((one, two), seconds)
        for coefficient in fit.solve():
            assert 0.0 <= coefficient < math.inf
