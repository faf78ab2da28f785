"""When an attempt is repeated: limits, pauses, the budget, and who is poison."""

from __future__ import annotations

import pytest

from baton.errors import InternalError, Overloaded, PoisonRequest, WorkerLost, WorkerMoved
from baton.types.fleet import Peer, Role
from conductor.link import Stage
from conductor.retries import Retries, RetryBudget, RetryOptions, Tries

GONE = WorkerLost("gone")
DECODE = Role.DECODE


def worker(number: int) -> Peer:
    return Peer(f"w{number}", "life", "host:1")


def dead(peer: Peer) -> bool:
    return False


def tries(refused: list[str] | None = None, **options: float) -> Tries:
    heard = refused if refused is not None else []
    values = {"seed": 1} | options
    return Tries(Retries(RetryOptions(**values), 0.0, heard.append), "r")  # type: ignore[arg-type]


def test_the_first_repetition_is_at_once_and_later_ones_after_growing_pauses() -> None:
    answer = tries(failures=10)
    pauses = [answer.after(GONE, brought_tokens=False, now=0.0) for _ in range(8)]
    assert pauses[0] == 0
    full = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses[1:], full, strict=True))
    assert len(set(pauses)) == 8  # jittered: even the last two differ
    assert pauses == [
        again.after(GONE, brought_tokens=False, now=0.0)
        for again in [tries(failures=10)]
        for _ in range(8)
    ]


def test_tokens_begin_the_count_of_failures_anew() -> None:
    refused: list[str] = []
    answer = tries(refused, failures=3)
    for _ in range(5):
        assert answer.after(GONE, brought_tokens=True, now=0.0) == 0
    answer.after(GONE, brought_tokens=False, now=0.0)
    with pytest.raises(WorkerLost):
        answer.after(GONE, brought_tokens=False, now=0.0)
    assert refused == ["limit"]


def test_what_is_not_retryable_is_not_repeated() -> None:
    refused: list[str] = []
    with pytest.raises(InternalError, match="a bug"):
        tries(refused).after(InternalError("a bug"), brought_tokens=True, now=0.0)
    assert not refused


def test_the_budget_bounds_retries_by_requests_and_time() -> None:
    budget = RetryBudget(RetryOptions(burst=2, share=0.5, per_s=1.0), 100.0)
    assert [budget.withdraw(100.0) for _ in range(3)] == [True, True, False]
    budget.deposit()
    assert not budget.withdraw(100.0)
    budget.deposit()
    assert budget.withdraw(100.0)
    assert not budget.withdraw(100.5)
    assert budget.withdraw(101.0)
    assert [budget.withdraw(200.0) for _ in range(3)] == [True, True, False]  # no more than burst


def test_an_empty_budget_ends_the_request_with_an_error_that_may_be_tried_again() -> None:
    refused: list[str] = []
    answer = tries(refused, burst=1, per_s=0.0)
    assert answer.after(GONE, brought_tokens=True, now=0.0) == 0
    with pytest.raises(Overloaded, match=r"too many attempts are failing.*: gone"):
        answer.after(GONE, brought_tokens=True, now=0.0)
    assert refused == ["budget"]


@pytest.mark.parametrize("first", [Stage.COMPUTING, Stage.ANSWERING])
def test_two_workers_that_die_computing_make_poison(first: Stage) -> None:
    refused: list[str] = []
    answer = tries(refused, verdict_s=1.0)
    answer.on_loss(0, DECODE, first, worker(0))
    assert answer.after(GONE, brought_tokens=True, now=0.0) == 0
    answer.check(dead)
    answer.on_loss(1, DECODE, Stage.COMPUTING, worker(1))
    assert answer.after(GONE, brought_tokens=True, now=0.0) == 1.0  # a link may be back by then
    with pytest.raises(PoisonRequest, match=r"request r was stopped: .* \(w0, w1\)"):
        answer.check(dead)
    assert refused == ["poison"]


def test_what_went_well_at_another_worker_does_not_kill() -> None:
    answer = tries()
    answer.on_loss(0, Role.PREFILL, Stage.COMPUTING, worker(0))
    answer.on_loss(1, DECODE, Stage.COMPUTING, worker(1))  # so the prompt was computed
    answer.check(dead)
    answer.on_loss(2, DECODE, Stage.COMPUTING, worker(2))
    with pytest.raises(PoisonRequest):
        answer.check(dead)


def test_a_life_is_lost_once() -> None:
    answer = tries()
    answer.on_loss(0, DECODE, Stage.COMPUTING, worker(0))
    answer.on_loss(
        1, DECODE, Stage.COMPUTING, worker(0)
    )  # it stood still, and was dialled once more
    answer.check(dead)


def test_a_worker_that_only_lost_its_link_does_not_count() -> None:
    answer = tries()
    for number in range(4):
        answer.on_loss(number, DECODE, Stage.COMPUTING, worker(number))
        answer.check(lambda peer: peer.name != "w0")
    answer.on_loss(4, DECODE, Stage.COMPUTING, worker(4))
    with pytest.raises(PoisonRequest, match=r"\(w0, w4\)"):
        answer.check(dead)


@pytest.mark.parametrize(
    "losses",
    [
        [(0, Stage.QUEUED), (1, Stage.COMPUTING), (2, Stage.QUEUED)],  # it only waited
        [(0, Stage.COMPUTING), (0, Stage.COMPUTING)],  # both workers of one attempt
        [(0, Stage.ANSWERING), (1, Stage.ANSWERING), (2, Stage.ANSWERING)],  # each went on first
        [(0, Stage.COMPUTING), (1, Stage.ANSWERING)],
    ],
)
def test_a_request_that_happened_to_be_there_is_innocent(losses: list[tuple[int, Stage]]) -> None:
    answer = tries()
    for number, stage in losses:
        answer.on_loss(number, DECODE, stage, worker(number))
        answer.check(dead)


def test_a_worker_is_waited_for_as_long_as_one_may_come_back() -> None:
    answer = tries(worker_wait_s=30.0)
    assert answer.may_wait(5.0)
    assert answer.may_wait(34.9)
    assert not answer.may_wait(35.0)
    answer.after(GONE, brought_tokens=False, now=40.0)  # there was one, so the wait begins anew
    assert answer.may_wait(50.0)


def test_an_answer_whose_worker_moves_has_not_failed() -> None:
    refused: list[str] = []
    answer = tries(refused, failures=2, burst=1, share=0.0, per_s=0.0)
    moved = WorkerMoved("another role")
    pauses = [answer.after(moved, brought_tokens=False, now=0.0) for _ in range(5)]
    assert (pauses, refused) == ([0.0] * 5, [])
    assert answer.after(GONE, brought_tokens=False, now=0.0) == 0.0  # the first failure
