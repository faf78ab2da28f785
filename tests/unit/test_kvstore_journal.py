"""What is told to conductors of what changed."""

from __future__ import annotations

import pytest

from baton.errors import InternalError
from baton.types.kv_events import Tier
from baton.worker.kv_news import Change
from kvstore.journal import Journal
from tests.unit.kvstore_kit import chain_of

A, B, C = chain_of(1, 3)


def test_what_came_and_went_again_is_not_told() -> None:
    journal = Journal()
    cpu = journal.of(Tier.CPU)
    cpu.add(A)
    cpu.add(B)
    cpu.remove(A)
    assert journal.take() == [Change(Tier.CPU, B, b"")]
    cpu.remove(B)
    cpu.add(B)
    assert journal.take() == []


def test_tiers_are_told_apart() -> None:
    journal = Journal()
    journal.of(Tier.NVME).add(A)
    journal.of(Tier.CPU).add(A)
    journal.of(Tier.CPU).add(C)
    assert journal.take() == [Change(Tier.CPU, A + C, b""), Change(Tier.NVME, A, b"")]
    journal.of(Tier.CPU).remove(C)
    assert journal.take() == [Change(Tier.CPU, b"", C)]


def test_a_block_cannot_come_twice() -> None:
    cpu = Journal().of(Tier.CPU)
    cpu.add(A)
    with pytest.raises(InternalError):
        cpu.add(A)
