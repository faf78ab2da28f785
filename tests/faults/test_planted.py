"""The harness finds what it is there to find: known faults, planted one by one.

Each is a few lines of production code that do what a mistake there would do. The harness must
notice within SEEDS runs; without the fault the same runs are clean (`test_seeds.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import ANY

import pytest

import baton.kv.blocks.reads
import baton.kv.handoff.reader
import kvstore.segment_io
from baton.engine.block_pool import BlockPool
from baton.engine.loop import Engine
from baton.kv.handoff.publisher import HandoffPublisher
from conductor.answer_run import AnswerRun
from conductor.dispatch import Serving
from conductor.fleet import _Member
from conductor.inbox import Abort
from conductor.link import Link
from conductor.prefix_map import PrefixMap
from kvstore.disk_log import DiskLog
from kvstore.disk_space import Segment
from kvstore.segment_io import SegmentIo
from sim.plan import make_plan
from sim.run import run_seed

SEEDS = 150
DISK_SEEDS = 600  # of which one in eight has an NVMe tier
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


def messages_of_a_stale_incarnation_are_obeyed(patch: Patch) -> None:
    """Whoever has the name of a worker speaks for it, whatever became of it in between."""
    patch.setattr(_Member, "is_life", lambda member, incarnation: member.dead_at is None)


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


def records_are_believed_without_their_checksum(patch: Patch) -> None:
    patch.setattr(kvstore.segment_io, "checksum", lambda payload: ANY)


def a_torn_record_counts_as_present(patch: Patch) -> None:
    """A write that failed when a part of it was done."""
    write = SegmentIo.write

    def write_at_least_a_part(io: SegmentIo, place: Any, batch: Sequence[Any]) -> None:
        with suppress(OSError):
            write(io, place, batch)

    patch.setattr(SegmentIo, "write", write_at_least_a_part)


def files_are_closed_under_their_readers(patch: Patch) -> None:
    @contextmanager
    def using(log: DiskLog, segment: Segment) -> Iterator[None]:
        yield

    patch.setattr(DiskLog, "using", using)


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
    messages_of_a_stale_incarnation_are_obeyed,
)
PLANTED_BELOW: tuple[Callable[[Patch], None], ...] = (  # in the NVMe tier
    records_are_believed_without_their_checksum,
    a_torn_record_counts_as_present,
    files_are_closed_under_their_readers,
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_found(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert shows(range(SEEDS)), f"{SEEDS} runs did not show it"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("plant", PLANTED_BELOW, ids=lambda plant: plant.__name__)
def test_a_planted_fault_of_the_disk_is_found(
    plant: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    plant(monkeypatch)
    seeds = [seed for seed in range(DISK_SEEDS) if make_plan(seed).shape.disk]
    assert shows(seeds), f"{len(seeds)} runs did not show it"


def shows(seeds: Iterable[int]) -> bool:
    return any(run_seed(seed).violations for seed in seeds)
