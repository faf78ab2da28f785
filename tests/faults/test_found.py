"""What the fault harness has found, each with a seed that shows it when the bug is put back.

Seeds mean something else when plans change (`sim/plan.py`): then a test here fails, and the next
seed that shows its bug is found by `python -m tests.faults.test_found`. Each bug has a unit test as
well, which is named with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

import baton.kv.blocks.offer
from baton.errors import DeadlineExceeded
from baton.kv.handoff.publisher import HandoffPublisher
from baton.rpc.errors import to_wire
from baton.types.handoff import Refused
from sim.run import run_seed

Patch = pytest.MonkeyPatch


def offers_ignored_their_cancellation(patch: Patch) -> None:
    """A task group that is ending because of an error keeps a cancellation to itself, and the loop
    around it dialled the store again: a worker never ended. test_blocks_offers.py"""
    patch.setattr(baton.kv.blocks.offer, "raise_if_cancelled", lambda: None)


def an_early_attach_ended_the_request(patch: Patch) -> None:
    """When StartPrefill did not come in time, the decode worker heard "deadline exceeded", which is
    final, although the request had its whole deadline before it. test_handoff_failures.py"""
    expire = HandoffPublisher._expire

    def as_before(publisher: HandoffPublisher, lease: Any) -> None:
        if not lease.expected:
            late = to_wire(DeadlineExceeded("did not come in time"))
            lease.pair.outbox.put_nowait(Refused(lease.attempt, late))
        expire(publisher, lease)

    patch.setattr(HandoffPublisher, "_expire", as_before)


FOUND: dict[Callable[[Patch], None], int] = {
    offers_ignored_their_cancellation: 25,
    an_early_attach_ended_the_request: 21,
}


@pytest.mark.parametrize("bug", FOUND, ids=lambda bug: bug.__name__)
def test_what_was_found_once_stays_mended(bug: Callable[[Patch], None], monkeypatch: Patch) -> None:
    seed = FOUND[bug]
    assert not run_seed(seed).violations
    bug(monkeypatch)
    assert run_seed(seed).violations, "this seed does not show it any more: find another one"


def main() -> None:
    for bug in FOUND:
        with Patch.context() as patch:
            bug(patch)
            seed = next((n for n in range(2_000) if run_seed(n).violations), None)
        sys.stdout.write(f"{bug.__name__}: {seed}\n")


if __name__ == "__main__":
    main()
