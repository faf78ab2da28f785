"""What is told to conductors of what changed."""

from __future__ import annotations

import pytest

from baton.errors import InternalError
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from kvstore.journal import KEYS_PER_MESSAGE, Journal
from tests.unit.kvstore_kit import chain_of, key_of

A, B, C = chain_of(1, 3)


def test_what_came_and_went_again_is_not_told() -> None:
    journal = Journal()
    cpu = journal.of(Tier.CPU)
    cpu.add(A)
    cpu.add(B)
    cpu.remove(A)
    assert journal.take_events() == [KvEvents(1, Tier.CPU, added=B)]
    cpu.remove(B)
    cpu.add(B)
    assert journal.take_events() == []


def test_tiers_are_told_apart_and_counted_together() -> None:
    journal = Journal()
    journal.of(Tier.NVME).add(A)
    journal.of(Tier.CPU).add(A)
    assert journal.take_events() == [
        KvEvents(1, Tier.CPU, added=A),
        KvEvents(2, Tier.NVME, added=A),
    ]


def test_long_messages_are_cut() -> None:
    journal = Journal()
    keys = [key_of(n) for n in range(KEYS_PER_MESSAGE + 1)]
    for key in keys:
        journal.of(Tier.CPU).add(key)
    first, second = journal.take_events()
    assert first.added + second.added == b"".join(keys)
    parts = journal.snapshot([(Tier.CPU, keys), (Tier.NVME, [A])])
    assert [(p.tier, p.first, p.last) for p in parts] == [
        (Tier.CPU, True, False),
        (Tier.CPU, False, False),
        (Tier.NVME, False, True),
    ]


def test_a_snapshot_replaces_the_events_before_it() -> None:
    journal = Journal()
    journal.of(Tier.CPU).add(A)
    assert journal.snapshot([(Tier.CPU, [A])]) == [KvSnapshot(1, Tier.CPU, A, True, True)]
    assert journal.take_events() == []


def test_a_block_cannot_come_twice() -> None:
    cpu = Journal().of(Tier.CPU)
    cpu.add(A)
    with pytest.raises(InternalError):
        cpu.add(A)
