"""Bugs that the fault harness has found, each with a seed that shows it when the bug is put back.

Seeds mean something else when plans change (`sim/plan.py`): then a test here fails, and the next
seed that shows its bug is found by `python -m tests.faults.test_found`. Each bug has a unit test as
well, which is named with it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import baton.kv.blocks.offer
from sim.run import run_seed

Patch = pytest.MonkeyPatch


def offers_ignored_their_cancellation(patch: Patch) -> None:
    """A task group that is ending because of an error keeps a cancellation to itself, and the loop
    around it dialled the store again: a worker never ended. test_blocks_offers.py"""
    patch.setattr(baton.kv.blocks.offer, "raise_if_cancelled", lambda: None)


FOUND: dict[Callable[[Patch], None], int] = {
    offers_ignored_their_cancellation: 25,
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
