"""Routing as a pure function: load, room, ties, reasons."""

from __future__ import annotations

from collections import Counter

import pytest

from baton.errors import NoWorker
from baton.types.fleet import BlockState, Role, WorkerLoad, WorkerState
from conductor.backlog import Backlog
from conductor.router import Decision, RouteRequest, route
from conductor.views import FleetView, WorkerView
from tests.fake_worker import worker_info


def view(
    name: str,
    role: Role,
    state: WorkerState = WorkerState.LIVE,
    load: WorkerLoad | None = None,
    own_attempts: int = 0,
    own_prompt_tokens: int = 0,
    **info: object,
) -> WorkerView:
    return WorkerView(
        worker_info(name, role, **info),
        state,
        load or WorkerLoad(),
        own_attempts,
        Backlog(own_prompt_tokens, own_prompt_tokens * 1e-4),
    )


def prefill(name: str, **values: object) -> WorkerView:
    return view(name, Role.PREFILL, **values)  # type: ignore[arg-type]


def decode(name: str, **values: object) -> WorkerView:
    return view(name, Role.DECODE, **values)  # type: ignore[arg-type]


def choose(*workers: WorkerView, key: str = "r", tokens: int = 10, **request: object) -> Decision:
    wanted = RouteRequest(key, tuple(range(tokens)), 10, **request)  # type: ignore[arg-type]
    return route(wanted, FleetView(workers), now=0.0)


def names(decision: Decision) -> tuple[str | None, str]:
    return decision.prefill.info.name if decision.prefill else None, decision.decode.info.name


def test_the_least_loaded_pair() -> None:
    decision = choose(
        prefill("p0", load=WorkerLoad(waiting_tokens=500)),
        prefill("p1", own_prompt_tokens=100),
        decode("d0", load=WorkerLoad(running=3)),
        decode("d1", load=WorkerLoad(running=1, waiting=1)),
        decode("d2", own_attempts=3),
    )
    assert names(decision) == ("p1", "d1")
    assert decision.fetch_plan == ()
    assert any(reason.startswith("decode d1") for reason in decision.reasons)
    assert any(reason.startswith("prefill p1") for reason in decision.reasons)


def test_equal_queues_go_to_the_emptier_pool() -> None:
    full = ((BlockState.ACTIVE, 30), (BlockState.FREE, 2))
    free = ((BlockState.CACHED, 30), (BlockState.FREE, 2))
    decision = choose(
        decode("d0", load=WorkerLoad(running=1, blocks=full)),
        decode("d1", load=WorkerLoad(running=1, blocks=free)),
    )
    assert names(decision) == (None, "d1")


def test_without_prefill_workers_decode_computes_the_prompt() -> None:
    decision = choose(decode("d0"))
    assert decision.prefill is None
    assert "computes the prompt" in decision.reasons[-1]


def test_ties_are_spread_by_request_and_never_depend_on_the_order() -> None:
    workers = [decode(f"d{number}") for number in range(4)]
    chosen = [names(choose(*workers, key=f"request-{number}"))[1] for number in range(400)]
    again = [names(choose(*workers[::-1], key=f"request-{n}"))[1] for n in range(400)]
    assert chosen == again
    assert min(Counter(chosen).values()) > 60


@pytest.mark.parametrize(
    "state", [WorkerState.JOINING, WorkerState.SUSPECT, WorkerState.DRAINING, WorkerState.DEAD]
)
def test_only_live_workers_get_work(state: WorkerState) -> None:
    workers = (prefill("p0", state=state), decode("d0", state=state), decode("d1"))
    assert names(choose(*workers)) == (None, "d1")
    with pytest.raises(NoWorker, match=f"d0 is {state}"):
        choose(*workers[:2])


def test_workers_without_room_are_left_out() -> None:
    small, large = decode("d0", num_blocks=1), decode("d1", own_attempts=9)
    assert names(choose(small, large)) == (None, "d1")
    assert names(choose(prefill("p0", num_blocks=1), large, tokens=20)) == (None, "d1")
    with pytest.raises(NoWorker):
        choose(small)


def test_workers_that_failed_the_request_are_avoided_if_others_are_there() -> None:
    workers = (decode("d0"), decode("d1", own_attempts=5))
    assert names(choose(*workers, avoid=frozenset({"d0"}))) == (None, "d1")
    assert names(choose(workers[0], avoid=frozenset({"d0"}))) == (None, "d0")


def test_an_empty_fleet_says_what_to_do() -> None:
    with pytest.raises(NoWorker, match="--conductor"):
        choose(prefill("p0"))
