"""The harness finds what it is there to find: known faults, planted one by one.

Each is a few lines of production code that do what a mistake there would do. The harness must
notice within SEEDS runs; without the fault the same runs are clean (`test_seeds.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

import baton.kv.blocks.reads
import baton.kv.handoff.reader
from baton.engine.block_pool import BlockPool
from baton.engine.loop import Engine
from baton.kv.handoff.publisher import HandoffPublisher
from conductor.answer_run import AnswerRun
from conductor.dispatch import Serving
from conductor.inbox import Abort
from conductor.link import Link
from conductor.prefix_map import PrefixMap
from sim.run import run_seed

SEEDS = 150
Patch = pytest.MonkeyPatch


def release_before_the_digest_check(patch: Patch) -> None:
    async def unchecked(*_: object) -> None:
        return None

    patch.setattr(baton.kv.handoff.reader, "verify_digests", unchecked)


def borrowed_blocks_are_not_checked(patch: Patch) -> None:
    async def unchecked(*_: object) -> None:
        return None

    patch.setattr(baton.kv.blocks.reads, "verify_digests", unchecked)


def quarantined_blocks_are_used_again(patch: Patch) -> None:
    def quarantine(pool: BlockPool, blocks: Iterable[int]) -> None:
        pool.release(tuple(blocks))

    patch.setattr(BlockPool, "quarantine", quarantine)
    patch.setattr(BlockPool, "end_quarantine", lambda pool, blocks: None)


def stale_attempts_are_heard(patch: Patch) -> None:
    """The fence of the conductor: what a given-up attempt still says counts."""

    def run_of(serving: Any, event: Any) -> AnswerRun:
        if isinstance(event, Abort):
            raise event.error
        attempt = event.output.attempt if hasattr(event, "output") else event.attempt
        run: AnswerRun = serving._runs[attempt.request_id]
        return run

    patch.setattr(Serving, "_run_of", run_of)


def cancels_are_lost(patch: Patch) -> None:
    patch.setattr(Link, "cancel", lambda link, attempt, reason: None)


def a_resumed_answer_begins_anew(patch: Patch) -> None:
    begin = AnswerRun.begin

    def begin_anew(run: AnswerRun, split: bool) -> None:
        run._ids.clear()
        begin(run, split)

    patch.setattr(AnswerRun, "begin", begin_anew)


def the_deadline_is_not_kept(patch: Patch) -> None:
    arm = Serving._arm

    def arm_others(serving: Serving, when: float, event: Any) -> None:
        if not isinstance(event, Abort):
            arm(serving, when, event)

    patch.setattr(Serving, "_arm", arm_others)


def dead_peers_keep_their_leases(patch: Patch) -> None:
    patch.setattr(HandoffPublisher, "_expire", lambda publisher, lease: publisher._renew(lease))


def gaps_between_events_are_ignored(patch: Patch) -> None:
    apply = PrefixMap.apply

    def apply_all(prefix_map: PrefixMap, holder: str, message: Any) -> bool:
        known = prefix_map._holders.get(holder)
        if known is not None:
            known.next_number = message.number
        return apply(prefix_map, holder, message)

    patch.setattr(PrefixMap, "apply", apply_all)


def quarantine_never_ends(patch: Patch) -> None:
    patch.setattr(Engine, "end_quarantine", lambda engine, attempt: None)


def tokens_are_passed_on_as_they_come(patch: Patch) -> None:
    """Those of two workers over two links: some come too early, or twice."""
    patch.setattr(AnswerRun, "_in_order", lambda run, tokens: tokens)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    release_before_the_digest_check,
    borrowed_blocks_are_not_checked,
    quarantined_blocks_are_used_again,
    stale_attempts_are_heard,
    cancels_are_lost,
    a_resumed_answer_begins_anew,
    the_deadline_is_not_kept,
    dead_peers_keep_their_leases,
    gaps_between_events_are_ignored,
    quarantine_never_ends,
    tokens_are_passed_on_as_they_come,
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    found = next((seed for seed in range(SEEDS) if run_seed(seed).violations), None)
    assert found is not None, f"{SEEDS} runs did not show it"
