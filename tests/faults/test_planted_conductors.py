"""The harness finds what it is there to find, also with several conductors: faults planted into
production code one by one, as in `test_planted.py`.

Each has a seed that shows it, and the same seed is clean without it. When plans change, the next
one is found by `python -m tests.faults.test_planted_conductors`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

import baton.worker.links
from baton.errors import StaleAttempt
from baton.rpc.registry_memory import MemoryRegistry
from baton.types.request import AttemptId, Finish, FinishReason
from baton.worker.links import LinkServer
from baton.worker.tails import Tail
from conductor.answer_run import AnswerRun
from conductor.records import Records
from sim.run import run_seed_of_several

Patch = pytest.MonkeyPatch


def an_adopted_answer_is_sent_from_one_token_before(patch: Patch) -> None:
    adopt = AnswerRun.adopt

    def adopt_early(run: AnswerRun, attempt: AttemptId) -> None:
        run._client_has = max(0, run._client_has - 1)
        adopt(run, attempt)

    patch.setattr(AnswerRun, "adopt", adopt_early)


def what_the_client_has_is_sent_again(patch: Patch) -> None:
    """Double send after a resume at another conductor."""
    patch.setattr(AnswerRun, "_replay", lambda run, ready: ready)


def orphans_are_never_cancelled(patch: Patch) -> None:
    patch.setattr(LinkServer, "_on_orphan_timeout", lambda links, attempt: None)


def a_tail_lacks_its_last_token(patch: Patch) -> None:
    tokens = Tail.tokens
    patch.setattr(Tail, "tokens", lambda tail: tokens(tail)[:-1])


def conductors_do_not_withdraw(patch: Patch) -> None:
    async def stay(registry: MemoryRegistry, incarnation: str) -> None:
        return None

    patch.setattr(MemoryRegistry, "withdraw", stay)


def records_of_requests_are_kept_for_ever(patch: Patch) -> None:
    async def tell(records: Records, registry: Any, key: str) -> None:
        await registry.note_request(key, records._noted[key][0], 1e6)

    patch.setattr(Records, "_tell", tell)


def who_had_the_answer_before_takes_it_back(patch: Patch) -> None:
    """Found by the harness: nobody was told that somebody else has it."""
    patch.setattr(baton.worker.links, "TakenOver", StaleAttempt)
    patch.setattr(AnswerRun, "_on_stale", lambda run, message: StaleAttempt(message))


def other_conductors_hear_nothing_of_a_workers_blocks(patch: Patch) -> None:
    """Found by the harness: only the one whose attempt it was did."""
    patch.setattr(LinkServer, "_tell_others", lambda links: None)


def own_records_are_not_looked_at(patch: Patch) -> None:
    """Found by the harness: without the registry, an answer was begun again under a number that was
    in use."""
    find = Records.find

    async def find_elsewhere(records: Records, key: str) -> Any:
        noted, records._noted = records._noted, {}
        try:
            return await find(records, key)
        finally:
            records._noted = noted | records._noted

    patch.setattr(Records, "find", find_elsewhere)
    patch.setattr(AnswerRun, "_on_stale", lambda run, message: StaleAttempt(message))


def a_replaced_attempt_can_be_adopted(patch: Patch) -> None:
    """Found by the harness: its end was that somebody else has the answer, and when nobody had it
    any more, every conductor that the client tried said so, too."""

    def was_cancelled(finish: Finish) -> bool:
        return finish.reason is FinishReason.CANCELLED

    patch.setattr(baton.worker.links, "_was_given_up", was_cancelled)


PLANTED: dict[Callable[[Patch], None], int] = {
    an_adopted_answer_is_sent_from_one_token_before: 0,
    what_the_client_has_is_sent_again: 0,
    orphans_are_never_cancelled: 31,
    a_tail_lacks_its_last_token: 0,
    conductors_do_not_withdraw: 0,
    records_of_requests_are_kept_for_ever: 0,
    who_had_the_answer_before_takes_it_back: 2,
    other_conductors_hear_nothing_of_a_workers_blocks: 0,
    own_records_are_not_looked_at: 15,
    a_replaced_attempt_can_be_adopted: 10188,
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    seed = PLANTED[plant]
    assert not run_seed_of_several(seed).violations
    plant(monkeypatch)
    assert run_seed_of_several(seed).violations, "this seed does not show it any more"


def main() -> None:
    for plant in PLANTED:
        with Patch.context() as patch:
            plant(patch)
            seed = next((n for n in range(500) if run_seed_of_several(n).violations), None)
        sys.stdout.write(f"{plant.__name__}: {seed}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
