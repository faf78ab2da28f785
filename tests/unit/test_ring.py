"""Consistent hashing: who leaves takes nothing along, and nobody is overloaded."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.ring import Ring

WORKERS = [f"prefill-{number}" for number in range(100)]
GROUPS = [f"group {number}".encode() for number in range(10_000)]
RING = Ring.of(WORKERS)
OWNER = {group: RING.owners(group, 1)[0] for group in GROUPS}
names = st.sets(st.text(max_size=6), max_size=8)


@pytest.mark.parametrize("leaver", WORKERS[::9])
def test_only_the_arcs_of_who_leaves_move(leaver: str) -> None:
    after = RING.without(leaver)
    moved = [group for group in GROUPS if after.owners(group, 1)[0] != OWNER[group]]
    assert all(OWNER[group] == leaver for group in moved)
    assert len(moved) == sum(owner == leaver for owner in OWNER.values())
    # They go to many others.
    assert len({after.owners(group, 1)[0] for group in moved}) > 30


def test_when_a_worker_leaves_about_its_share_of_the_keys_moves() -> None:
    """Whichever it is, at most 1.1 shares of all keys; and of these keys, give or take chance."""
    shares = RING.shares()
    assert set(shares) == set(WORKERS)
    assert max(shares.values()) <= 1.1 / len(WORKERS)
    assert min(shares.values()) >= 0.9 / len(WORKERS)
    assert sum(shares.values()) == pytest.approx(1)
    after = RING.without("prefill-0")
    moved = sum(after.owners(group, 1) != (OWNER[group],) for group in GROUPS)
    assert moved <= 1.1 * len(GROUPS) / len(WORKERS)


def test_a_worker_that_comes_back_gets_its_groups_back() -> None:
    away = RING.without("prefill-7").without("prefill-3")
    back = away.with_("prefill-3").with_("prefill-7")
    assert all(back.owners(group, 1)[0] == OWNER[group] for group in GROUPS[:1000])
    assert len(away) == 98
    assert "prefill-3" not in away
    assert "prefill-3" in back
    assert back.with_("prefill-3") is back
    assert away.without("prefill-3") is away


@settings(deadline=None)
@given(st.lists(st.text(max_size=6), max_size=8), names, st.binary(max_size=8))
def test_it_does_not_matter_how_a_ring_came_about(
    begin: list[str], leavers: set[str], group: bytes
) -> None:
    ring = Ring.of([*begin, *leavers], virtual_nodes=20)
    for name in leavers:
        ring = ring.without(name)
    stayed = set(begin) - leavers
    other = Ring.of([], virtual_nodes=20)
    for name in sorted(stayed):
        other = other.with_(name)
    assert len(ring) == len(other) == len(stayed)
    assert ring.owners(group, 100) == other.owners(group, 100)


@settings(deadline=None)
@given(names, st.binary(max_size=8), st.integers(0, 10))
def test_owners_are_distinct_and_in_one_order(members: set[str], group: bytes, count: int) -> None:
    ring = Ring.of(members, virtual_nodes=20)
    everybody = ring.owners(group, 100)
    assert set(everybody) == members
    assert len(everybody) == len(members)
    assert ring.owners(group, count) == everybody[:count]


@settings(deadline=None)
@given(
    names.filter(bool),
    st.lists(st.binary(max_size=2), max_size=60),
    st.sampled_from((1.0, 1.25, 2.0)),
)
def test_nobody_gets_more_than_the_bound(
    members: set[str], groups: list[bytes], bound: float
) -> None:
    ring = Ring.of(members, virtual_nodes=20)
    loads: dict[str, float] = {"somebody who left": 1000.0}
    for done, group in enumerate(groups, start=1):
        name = ring.choose(group, loads, bound)
        loads[name] = loads.get(name, 0) + 1
        assert loads[name] <= math.ceil(bound * done / len(members))


def test_whoever_is_full_is_passed_over_for_the_next() -> None:
    ring = Ring.of("abc")
    first, second, third = ring.owners(b"group", 3)
    assert ring.choose(b"group", {}) == first
    assert ring.choose(b"group", {first: 5.0}) == second
    assert ring.choose(b"group", {first: 5.0, second: 5.0, third: 0.5}) == third


def test_an_empty_ring_owns_nothing() -> None:
    ring = Ring.of([])
    assert ring.owners(b"group", 3) == ()
    with pytest.raises(ValueError, match="empty"):
        ring.choose(b"group", {})


def test_owners_are_the_same_in_every_process_and_version() -> None:
    """Conductors that share a fleet must agree."""
    assert [Ring.of("abcdefgh").owners(group, 2) for group in GROUPS[:3]] == [
        ("g", "f"),
        ("c", "g"),
        ("e", "a"),
    ]
