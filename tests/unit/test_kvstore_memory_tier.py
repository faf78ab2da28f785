"""Slots, pins, and what a process finds that is started after another one was killed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import InternalError
from kvstore.format import BlockInfo, fingerprint
from kvstore.memory_tier import MemoryTier, SlotState
from kvstore.slot_table import HEADER_BYTES, SlotTable, StoredSlot, map_file
from tests.unit.kvstore_kit import (
    BLOCK,
    LAYOUT,
    Areas,
    chain_of,
    commit_sealed,
    info_of,
    make_memory,
    payload_of,
    recover,
)

A, B, C, D = chain_of(1, 4)


def put(memory: MemoryTier, *keys: bytes) -> None:
    for key in keys:
        slot = memory.begin(key)
        assert slot is not None
        memory.view(slot)[:] = payload_of(key)
        commit_sealed(memory, key)
    memory.check_integrity()


def contents(memory: MemoryTier) -> dict[bytes, bytes]:
    return {key: bytes(memory.view(memory._ready[key])) for key in memory}


def restarted(areas: Areas) -> MemoryTier:
    memory = make_memory(areas.copy())
    assert recover(memory) == len(memory)
    memory.check_integrity()
    return memory


def test_a_block_is_found_once_it_is_committed() -> None:
    memory = make_memory(Areas.of(2))
    slot = memory.begin(A, 3, B)
    assert A not in memory
    assert memory.is_filling(A)
    assert slot is not None
    memory.view(slot)[:] = payload_of(A)
    commit_sealed(memory, A)
    assert memory.slot_of(A) == slot
    assert memory.info(A) == info_of(A, 3, B)
    assert dict(memory.counts()) == {
        SlotState.FREE: 1,
        SlotState.CLAIMED: 0,
        SlotState.FILLING: 0,
        SlotState.READY: 1,
    }


def test_aborting_frees_the_slot() -> None:
    memory = make_memory(Areas.of(1))
    memory.begin(A)
    assert memory.begin(B) is None
    memory.abort(A)
    put(memory, B)
    assert contents(memory) == {B: payload_of(B)}


def test_pinned_blocks_are_no_victims() -> None:
    memory = make_memory(Areas.of(2))
    put(memory, A, B)
    memory.pin(A)
    memory.pin(A)
    memory.unpin(A)
    assert memory.victim() == B
    memory.evict(B)
    assert memory.victim() is None
    with pytest.raises(InternalError):
        memory.evict(A)
    memory.unpin(A)
    assert memory.victim() == A


@pytest.mark.parametrize("misuse", ["begin", "commit", "abort", "unpin"])
def test_misuse_is_a_bug_that_is_named(misuse: str) -> None:
    memory = make_memory(Areas.of(2))
    put(memory, A)
    with pytest.raises(InternalError):
        {
            "begin": lambda: memory.begin(A),
            "commit": lambda: memory.commit(B),
            "abort": lambda: memory.abort(B),
            "unpin": lambda: memory.unpin(A),
        }[misuse]()
    memory.check_integrity()


def test_a_restart_finds_what_was_committed_and_nothing_else() -> None:
    areas = Areas.of(4)
    memory = make_memory(areas)
    put(memory, A, B, C)
    memory.evict(B)
    half = memory.begin(D)
    assert half is not None
    memory.view(half)[: BLOCK // 2] = payload_of(D)[: BLOCK // 2]
    assert contents(restarted(areas)) == {A: payload_of(A), C: payload_of(C)}


def test_a_restart_keeps_the_order_of_eviction() -> None:
    areas = Areas.of(3)
    memory = make_memory(areas)
    put(memory, C, A, B)
    again = restarted(areas)
    order = []
    while (victim := again.victim()) is not None:
        again.evict(victim)
        order.append(victim)
    assert order == [C, A, B]


def test_blocks_of_another_layout_are_not_adopted() -> None:
    areas = Areas.of(2)
    put(make_memory(areas), A)
    other = make_memory(areas, layout=replace(LAYOUT, model="other"))
    assert recover(other) == 0
    other.check_integrity()


def test_two_slots_with_one_key_become_one() -> None:
    areas = Areas.of(2)
    put(make_memory(areas), A)
    areas.payload[BLOCK:] = areas.payload[:BLOCK]
    areas.headers[HEADER_BYTES:] = areas.headers[:HEADER_BYTES]
    assert contents(restarted(areas)) == {A: payload_of(A)}


@given(cut=st.integers(0, HEADER_BYTES), old=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_header_that_was_half_written_is_none(cut: int, old: bool) -> None:
    buffer = bytearray(HEADER_BYTES)
    table = SlotTable(memoryview(buffer), fingerprint(LAYOUT), BLOCK)
    stored = StoredSlot(BlockInfo(A, 1, B, C), 7)
    if old:
        table.write(0, BlockInfo(D, 9, A, B), 6)
    before = bytes(buffer)
    table.clear(0)
    table.write(0, stored.info, stored.generation)
    buffer[cut:] = before[cut:]
    assert table.read(0) in (stored, StoredSlot(BlockInfo(D, 9, A, B), 6), None)
    if not old and cut < 104:
        assert table.read(0) is None


@given(
    damage=st.lists(
        st.tuples(
            st.booleans(), st.floats(0, 1), st.integers(1, 64), st.sampled_from(["flip", "zero"])
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=400, deadline=None)
def test_whatever_is_damaged_is_dropped(damage: list[tuple[bool, float, int, str]]) -> None:
    areas = Areas.of(6)
    keys = chain_of(1, 5)
    put(make_memory(areas), *keys)
    touched = set()
    for in_header, where, length, how in damage:
        area = areas.headers if in_header else areas.payload
        start = int(where * (len(area) - 1))
        for at in range(start, min(len(area), start + length)):
            before = area[at]
            area[at] = 0 if how == "zero" else area[at] ^ 0x40
            if area[at] != before:
                touched.add(at // (HEADER_BYTES if in_header else BLOCK))
    found = contents(restarted(areas))
    assert all(found[key] == payload_of(key) for key in found)
    # Slots were given from the first on; what nobody touched is still there.
    assert {key for n, key in enumerate(keys) if n not in touched} <= found.keys()


def test_files_are_mapped_at_their_size(tmp_path: Path) -> None:
    area = map_file(tmp_path / "area", 3 * 4096)
    area[:3] = b"abc"
    again = map_file(tmp_path / "area", 3 * 4096)
    assert again[:3] == b"abc"
    assert (tmp_path / "area").stat().st_mode & 0o077 == 0
