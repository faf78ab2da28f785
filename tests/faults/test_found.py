"""What the fault harness has found, each with a seed that shows it when the mistake is put back.

In baton (BUGS; each has a unit test as well, which is named with it) and in the harness itself
(RULES: it called something wrong that is not). The seed is the one that found it, where that still
shows it. Seeds mean something else when plans change (`sim/plan.py`): then a test here fails, and
`python -m tests.faults.test_found` finds the next seed that shows the mistake. Stores got their
disks later, and there were several conductors later still: each seed says which plan it means.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

import baton.kv.blocks.offer
import sim.checks
import sim.run
from baton.types.fleet import Peer, Role
from conductor.answer_run import AnswerRun
from conductor.link import Stage
from conductor.retries import Tries
from sim.checks import NEWS_S, RELEASE_S, Ending
from sim.network import Incident, Network
from sim.plan import Plan, Shape, make_plan
from sim.plan_conductors import make_plan_of_several
from sim.run import IDLE_S, _Run, run_plan

Patch = pytest.MonkeyPatch


def offers_ignored_their_cancellation(patch: Patch) -> None:
    """A task group that is ending because of an error keeps a cancellation to itself, and the loop
    around it dialled the store again: a worker never ended. test_blocks_offers.py"""
    patch.setattr(baton.kv.blocks.offer, "raise_if_cancelled", lambda: None)


def a_lost_link_was_a_death(patch: Patch) -> None:
    """Workers that had a link again counted as dead: a request was stopped as poison that had
    killed nobody. test_conductor_retries.py"""
    check = Tries.check
    patch.setattr(Tries, "check", lambda tries, is_live: check(tries, lambda worker: False))


def one_death_was_counted_twice(patch: Patch) -> None:
    """A request whose next attempt went to the same dead worker, before it was missed, was stopped
    as poison. test_conductor_retries.py"""
    on_loss = Tries.on_loss

    def as_before(tries: Tries, number: int, duty: Role, stage: Stage, worker: Peer) -> None:
        life = replace(worker, incarnation=f"{worker.incarnation}, attempt {number}")
        on_loss(tries, number, duty, stage, life)

    patch.setattr(Tries, "on_loss", as_before)


def deaths_in_different_duties_added_up(patch: Patch) -> None:
    """A prefill worker died of something else, the prompt was computed by the next one, and the
    death of a decode worker made it two. test_conductor_retries.py"""
    on_loss = Tries.on_loss

    def as_before(tries: Tries, number: int, duty: Role, stage: Stage, worker: Peer) -> None:
        on_loss(tries, number, Role.DECODE, stage, worker)

    patch.setattr(Tries, "on_loss", as_before)


def a_conductor_knew_its_workers_at_once(patch: Patch) -> None:
    """It had started anew, and incidents kept its workers away for longer than NEWS_S."""

    def as_before(kill: Incident, incidents: Iterable[Incident]) -> float:
        return kill.until + NEWS_S

    patch.setattr(sim.checks, "_knows_nobody_until", as_before)


def books_were_read_too_early(patch: Patch) -> None:
    """While an offer waited to dial its store again, all looked idle."""

    async def as_before(run: _Run) -> None:
        await run._until(run._all_idle, IDLE_S)
        await asyncio.sleep(1.0)

    patch.setattr(_Run, "_come_to_rest", as_before)


def a_worker_became_slow_when_the_request_had_ended(patch: Patch) -> None:
    """And so it still had a step of it to end when it should have let go."""
    during = sim.checks._during

    def as_before(story: Ending, incidents: Any, and_s: float = 0.0) -> list[Incident]:
        return during(story, incidents)

    patch.setattr(sim.checks, "_during", as_before)


def steps_were_thought_shorter(patch: Patch) -> None:
    """Where prefill is slow, one step takes longer than RELEASE_S."""

    def as_before(shape: Shape) -> float:
        return RELEASE_S

    patch.setattr(sim.checks, "release_s", as_before)
    patch.setattr(sim.run, "release_s", as_before)


def conductors_noticed_at_once_that_a_client_had_gone(patch: Patch) -> None:
    """One was killed before it did, and so the answer was an orphan when it should be let go."""
    during = sim.checks._during

    def as_before(story: Ending, incidents: Any, and_s: float = 0.0) -> list[Incident]:
        return during(story, incidents, min(and_s, RELEASE_S))

    patch.setattr(sim.checks, "_during", as_before)


def a_number_was_used_by_two_connections(patch: Patch) -> None:
    """A client came back twice to one conductor, which began both times an attempt with the same
    number. The end of the first was taken for that of the second, and the prefill worker kept the
    KV of that until its lease ended. test_conductor_takeover.py"""
    patch.setattr(AnswerRun, "follow", lambda run, older: None)


def leases_were_those_of_a_life_before(patch: Patch) -> None:
    """A prefill worker was killed, and its next life got an attempt of the same number: the lease
    seemed to have been silent since the first."""
    patch.setattr(Network, "kill", lambda network, name: network.services.kill(name))


MakePlan = Callable[[int], Plan]


def without_disks(seed: int) -> Plan:
    return make_plan(seed, disks=False)


BUGS: dict[Callable[[Patch], None], tuple[MakePlan, int]] = {
    offers_ignored_their_cancellation: (without_disks, 25),
    one_death_was_counted_twice: (without_disks, 440),
    a_number_was_used_by_two_connections: (make_plan_of_several, 4728),
}
RULES: dict[Callable[[Patch], None], tuple[MakePlan, int]] = {
    a_conductor_knew_its_workers_at_once: (without_disks, 1635),
    books_were_read_too_early: (without_disks, 3465),
    a_worker_became_slow_when_the_request_had_ended: (without_disks, 5562),
    steps_were_thought_shorter: (make_plan, 11295),
    conductors_noticed_at_once_that_a_client_had_gone: (make_plan_of_several, 15620),
    leases_were_those_of_a_life_before: (make_plan_of_several, 482),
}
FOUND = BUGS | RULES
MORE_SEEDS = [
    *((without_disks, seed) for seed in (76, 132, 350, 1050, 1466, 3561, 3790, 3998, 4656)),
    (make_plan_of_several, 10102),
]
"""Found bugs, too, which they need not show any more."""


def goes_wrong(make: MakePlan, seed: int) -> bool:
    return bool(run_plan(make(seed)).violations)


@pytest.mark.parametrize("mistake", FOUND, ids=lambda mistake: mistake.__name__)
def test_what_was_found_once_stays_mended(
    mistake: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    make, seed = FOUND[mistake]
    assert not goes_wrong(make, seed)
    mistake(monkeypatch)
    assert goes_wrong(make, seed), "this seed does not show it any more: find another one"


@pytest.mark.parametrize(("make", "seed"), MORE_SEEDS)
def test_seeds_that_found_something_are_clean(make: MakePlan, seed: int) -> None:
    assert not goes_wrong(make, seed)


def main() -> None:
    for mistake, (make, _) in FOUND.items():
        with Patch.context() as patch:
            mistake(patch)
            seed = next((seed for seed in range(12_000) if goes_wrong(make, seed)), None)
        sys.stdout.write(f"{mistake.__name__}: {seed}\n")


if __name__ == "__main__":
    main()
