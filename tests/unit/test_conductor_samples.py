"""What a worker reports becomes samples of its costs."""

from __future__ import annotations

import pytest

from baton.types.fleet import Peer, Role, WorkerLoad
from baton.types.kv_events import Tier
from baton.types.link import FetchPart, StepReport
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    SampledToken,
    Span,
)
from conductor.cost_fit import CostModel
from conductor.cost_model import MIN_SAMPLES
from conductor.worker_samples import Computed, WorkerMeter
from tests.fake_worker import BLOCK_SIZE, layout, worker_info

STORE = Peer("store-a", "1", "a:1")
DONE = FinishReason.HANDED_OFF


def meter(model: CostModel | None = None) -> WorkerMeter:
    return WorkerMeter(model or CostModel(), worker_info("w", Role.DECODE), "store-a".__eq__)


def step(batch: int, ended: int = 0) -> StepReport:
    outputs = [
        AttemptOutput(
            AttemptId(f"r{number}"),
            (SampledToken(7, 0),),
            Finish(FinishReason.LENGTH) if number < ended else None,
        )
        for number in range(batch)
    ]
    return StepReport(tuple(outputs), WorkerLoad(running=batch))


def test_steps_of_a_batch_are_its_tpot() -> None:
    own, now = meter(), 0.0
    for _ in range(200):
        own.on_report(step(8), now)
        now += 0.03
    cost = own.cost().decode
    assert not cost.is_prior
    assert cost.seconds(8) == pytest.approx(0.03, rel=0.1)


def test_pauses_between_answers_are_no_steps() -> None:
    own, now = meter(), 0.0
    for _ in range(20):
        for _ in range(6):
            own.on_report(step(1), now)
            now += 0.01
        own.on_report(step(1, ended=1), now)
        now += 5.0
    cost = own.cost().decode
    assert not cost.is_prior
    assert cost.seconds(1) == pytest.approx(0.01, rel=0.2)


def test_reports_without_tokens_tell_nothing() -> None:
    own = meter()
    for number in range(100):
        own.on_report(StepReport((), WorkerLoad(running=3)), number / 10)
    assert own.cost().decode.is_prior


def finish(*spans: Span, cached: int = 0, reason: FinishReason = DONE) -> Finish:
    return Finish(reason, None, cached, spans)


def test_prefills_and_handoffs_are_learned_from_their_spans() -> None:
    model = CostModel()
    own = meter(model)
    for number in range(2 * MIN_SAMPLES):
        at = 10.0 * number
        spans = (Span("prefill", at, at + 2.0), Span("handoff", at + 2.0, at + 2.5))
        own.on_finish(Computed(1000), finish(*spans, cached=500), now=at)
    cost = own.cost().prefill
    assert not cost.is_prior
    assert cost.seconds(500, 500) == pytest.approx(2.0, rel=0.1)
    num_bytes = layout().blocks_for(1000) * layout().block_bytes
    assert model.transfers().handoff.seconds(num_bytes) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_what_did_not_end_well_tells_nothing(reason: FinishReason) -> None:
    own = meter()
    for number in range(20):
        span = Span("prefill", 10.0 * number, 10.0 * number + 2)
        own.on_finish(Computed(1000), finish(span, reason=reason), now=10.0 * number)
    assert own.cost().prefill.is_prior


def test_a_fetch_is_a_sample_of_its_path_and_no_part_of_the_prefill() -> None:
    model = CostModel()
    own = meter(model)
    plan = (FetchPart(STORE, 0, 10, Tier.NVME),)
    for number in range(2 * MIN_SAMPLES):
        at = 10.0 * number
        spans = (Span("prefill", at, at + 3.0), Span("fetch", at, at + 1.0))
        own.on_finish(Computed(1000, plan), finish(*spans, cached=10 * BLOCK_SIZE), now=at)
    assert own.cost().prefill.seconds(840, 160) == pytest.approx(2.0, rel=0.1)
    fetch = model.transfers().fetch(Tier.NVME, True)
    assert fetch.seconds(10 * layout().block_bytes) == pytest.approx(1.0, rel=0.1)


def test_a_fetch_that_came_in_part_is_no_sample() -> None:
    model = CostModel()
    own = meter(model)
    plan = (FetchPart(STORE, 0, 10, Tier.NVME),)
    for number in range(2 * MIN_SAMPLES):
        at = 10.0 * number
        span = Span("fetch", at, at + 1.0)
        own.on_finish(Computed(1000, plan), finish(span, cached=9 * BLOCK_SIZE), now=at)
    assert model.transfers().fetch(Tier.NVME, True).is_prior


def test_hundreds_of_prompts_per_second_are_thinned_out() -> None:
    own = meter()
    for number in range(100):
        at = number / 1000
        own.on_finish(Computed(1000), finish(Span("prefill", at, at + 1e-3)), now=at)
    assert own.cost().prefill.samples < 10
