"""Who is turned away, why, and for how long."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import Overloaded
from baton.types.fleet import Role, WorkerLoad, WorkerState
from conductor.admission import Admission, Slos, TpotBy
from conductor.backlog import Ahead, Backlog
from conductor.cost_model import DecodeCost, PrefillCost, WorkerCost
from conductor.router import Decision, RouteOptions, RouteRequest, route
from conductor.service import Policy
from conductor.views import FleetView, WorkerView
from tests.fake_worker import Script, fake_cluster, say, wait_for, worker_info
from tests.unit.test_conductor_dispatch import ask, text_of
from tests.virtual_time import virtual_time

MEASURED = WorkerCost(PrefillCost(0.0, 1e-3, 0.0, 99), DecodeCost(0.02, 1e-3, 99))


def decide(
    queue_s: float = 0.0,
    running: int = 0,
    cost: WorkerCost = MEASURED,
    tokens: int = 100,
    ahead: tuple[Ahead, ...] = (),
    priority: int = 0,
) -> Decision:
    backlog = Backlog(1, queue_s, ahead or (Ahead((0, 0.0), queue_s),)) if queue_s else Backlog()
    idle = WorkerLoad(running=running)
    fleet = FleetView(
        (
            WorkerView(
                worker_info("p0", Role.PREFILL), WorkerState.LIVE, WorkerLoad(), 0, backlog, cost
            ),
            WorkerView(worker_info("d0", Role.DECODE), WorkerState.LIVE, idle, cost=cost),
        )
    )
    asked = RouteRequest("r", tuple(range(tokens)), 10, priority=priority)
    return route(asked, fleet, 0.0, RouteOptions(local_tokens=0))


@pytest.fixture
def rejections() -> list[str]:
    return []


async def test_a_queue_that_would_miss_the_slo_turns_requests_away(rejections: list[str]) -> None:
    admission = Admission(9, Slos(ttft_s=1.0), rejections.append)
    admission.judge(decide(queue_s=0.8))
    with pytest.raises(Overloaded, match=r"first token, 3.6 s is over the SLO of 1 s") as caught:
        admission.judge(decide(queue_s=3.5))
    assert 0.75 * 2.6 <= caught.value.retry_after_s <= 1.25 * 2.6 / 0.98
    assert "try again in" in caught.value.message
    assert rejections == ["ttft"]


async def test_predictions_that_are_often_missed_get_a_margin(rejections: list[str]) -> None:
    admission = Admission(9, Slos(ttft_s=1.0), rejections.append)
    assert admission.ttft is not None
    admission.judge(decide(queue_s=0.8))
    for number in range(40):
        admission.ttft.add(0.9, 0.9 if number % 2 else 1.08, asyncio.get_running_loop().time())
    with pytest.raises(Overloaded, match=r"900 ms × 1.20 as a margin, is over the SLO of 1 s"):
        admission.judge(decide(queue_s=0.8))
    admission.judge(decide(queue_s=0.7))
    assert rejections == ["ttft"]


async def test_the_more_are_turned_away_the_later_they_are_to_come_again() -> None:
    admission = Admission(9, Slos(ttft_s=1.0), seed=1)

    def retry_s() -> float:
        with pytest.raises(Overloaded) as caught:
            admission.judge(decide(queue_s=1.5))
        return caught.value.retry_after_s

    assert retry_s() < 2.0
    for _ in range(60):  # one of ten is let in
        admission.judge(decide(queue_s=0.1))
        told = [retry_s() for _ in range(9)]
    assert 6.0 < min(told) < max(told) < 16.0
    assert len(set(told)) == len(told)  # they do not come back together
    for _ in range(2000):
        assert retry_s() <= 60.0


async def test_only_load_is_a_reason(rejections: list[str]) -> None:
    admission = Admission(9, Slos(ttft_s=0.05, tpot_s=0.01), rejections.append)
    admission.judge(decide(tokens=200))  # too long for the SLO, but nothing is in its way
    assert rejections == []


async def test_guesses_turn_nobody_away() -> None:
    admission = Admission(9, Slos(ttft_s=0.5, tpot_s=0.01))
    admission.judge(decide(queue_s=9.0, running=50, cost=WorkerCost()))


async def test_urgent_requests_are_judged_by_the_work_ahead_of_them(
    rejections: list[str],
) -> None:
    admission = Admission(9, Slos(ttft_s=1.0), rejections.append)
    ahead = (Ahead((-1, 0.0), 0.5), Ahead((5, 0.0), 8.0))
    admission.judge(decide(queue_s=8.5, ahead=ahead, priority=0))
    with pytest.raises(Overloaded):
        admission.judge(decide(queue_s=8.5, ahead=ahead, priority=5))


async def test_a_batch_that_would_be_too_slow_turns_requests_away(rejections: list[str]) -> None:
    admission = Admission(9, Slos(tpot_s=0.03), rejections.append)
    admission.judge(decide(running=9))
    with pytest.raises(Overloaded, match=r"with 21 sequences on d0, 41 ms is over the SLO of 30"):
        admission.judge(decide(running=20))
    assert rejections == ["tpot"]


@virtual_time
async def test_retry_after_follows_from_how_long_requests_take() -> None:
    policy = Policy(lease_ttl_s=1e6, max_answers=2)
    async with fake_cluster(lambda _: Script((97,), prefill_s=30.0), policy=policy) as cluster:
        for _ in range(20):
            await asyncio.gather(*(ask(cluster.conductor, max_tokens=1) for _ in range(2)))
        running = [asyncio.create_task(ask(cluster.conductor, max_tokens=1)) for _ in range(2)]
        await wait_for(lambda: cluster.conductor.running == 2)
        with pytest.raises(Overloaded, match="the bound is 2") as caught:
            await ask(cluster.conductor)
        assert 9 < caught.value.retry_after_s < 20  # two places, each for half a minute
        await asyncio.gather(*running)
        text = cluster.conductor.metrics.render().decode()
        assert 'baton_rejections_total{reason="queue"} 1.0' in text


@virtual_time
async def test_costs_are_learned_and_then_kept_to() -> None:
    policy = Policy(lease_ttl_s=1e6, slos=Slos(ttft_s=3.5), routing=RouteOptions(local_tokens=0))
    slow = Script((97, 98, 256), prefill_s=1.0)
    async with fake_cluster(lambda _: slow, policy=policy) as cluster:
        early = await asyncio.gather(*(ask(cluster.conductor, "a" * 64) for _ in range(6)))
        assert len(early) == 6  # nothing is known yet: nobody is turned away
        for _ in range(60):  # the early ones were computed at the same time
            await ask(cluster.conductor, "a" * 64)
        # Different ones: of equal prompts the worker would be expected to compute the first only.
        waiting = [asyncio.create_task(ask(cluster.conductor, c * 64)) for c in "abc"]
        await wait_for(lambda: cluster.conductor.running == 3)
        with pytest.raises(Overloaded, match="first token"):
            await ask(cluster.conductor, "d" * 64)
        text = cluster.conductor.metrics.render().decode()
        assert 'baton_rejections_total{reason="ttft"} 1.0' in text
        assert "baton_ttft_prediction_ratio_count" in text
        for deltas, _ in await asyncio.gather(*waiting):
            assert text_of(deltas) == "ab"
        await cluster.check_nothing_left()


@virtual_time
async def test_without_slos_predictions_turn_nobody_away() -> None:
    async with fake_cluster(say("x", prefill_s=5.0)) as cluster:
        for _ in range(10):
            await ask(cluster.conductor)
        await asyncio.gather(*(ask(cluster.conductor) for _ in range(20)))


@pytest.mark.parametrize(
    ("by", "ended", "told"),
    [
        (TpotBy.ASSIGNED, 200, "31 sequences"),
        (TpotBy.NOW, 200, "25 sequences"),
        (TpotBy.PREDICTED, 200, None),
        (TpotBy.PREDICTED, 1, None),
        (TpotBy.PREDICTED, 0, "31 sequences"),
    ],
)
async def test_which_sequences_count_against_the_tpot(
    by: TpotBy, ended: int, told: str | None
) -> None:
    """24 decode, each for ten seconds, and 6 wait for their prompts; in five seconds, half of the
    24 have ended: 12 + 6 others keep the SLO. Before any request has ended, all stay."""
    admission = Admission(9, Slos(tpot_s=0.04, tpot_by=by))
    for _ in range(ended):
        admission.note_decode(10.0)
    backlog = Backlog(1, 4.9, (Ahead((0, 0.0), 4.9),))
    decode = WorkerView(
        worker_info("d0", Role.DECODE), WorkerState.LIVE, WorkerLoad(), 30, cost=MEASURED,
        own_decoding=24,
    )  # fmt: skip
    prefill = WorkerView(
        worker_info("p0", Role.PREFILL), WorkerState.LIVE, WorkerLoad(), 6, backlog, MEASURED
    )
    asked = RouteRequest("r", tuple(range(100)), 10)
    decision = route(asked, FleetView((prefill, decode)), 0.0, RouteOptions(local_tokens=0))
    if told is None:
        admission.judge(decision)
    else:
        with pytest.raises(Overloaded, match=told):
            admission.judge(decision)


async def test_a_long_prompt_is_not_let_in_where_a_short_one_is_refused() -> None:
    """Who asks later with a short prompt takes the places that are free before the long one is
    computed."""
    admission = Admission(9, Slos(tpot_s=0.04, tpot_by=TpotBy.PREDICTED))
    for _ in range(200):
        admission.note_decode(10.0)
    for _ in range(200):
        with pytest.raises(Overloaded):
            admission.judge(decide(running=30))
    with pytest.raises(Overloaded):
        admission.judge(decide(running=30, queue_s=9.0))
