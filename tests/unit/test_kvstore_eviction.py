"""Victims of the eviction policies, against a search through all blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import ConfigError, InternalError
from kvstore.eviction import POLICIES, LengthAware, Lfu, Lru, make_policy
from tests.unit.kvstore_kit import NO_PARENT, chain_of, key_of

A, B, C, D = chain_of(1, 4)


def drain(policy: Lru | Lfu | LengthAware) -> list[bytes]:
    """Every victim, in order."""
    victims = []
    while (victim := policy.victim()) is not None:
        policy.on_remove(victim)
        victims.append(victim)
    return victims


def insert_chain(policy: Lru | Lfu | LengthAware, keys: list[bytes]) -> None:
    for depth, key in enumerate(keys):
        policy.on_insert(key, depth, keys[depth - 1] if depth else NO_PARENT)


@pytest.mark.parametrize("name", POLICIES)
def test_a_chain_goes_from_its_end(name: str) -> None:
    policy = POLICIES[name]()
    keys = chain_of(1, 10)
    insert_chain(policy, keys)
    for key in keys[::-1]:
        policy.on_hit(key)
    assert drain(policy) == keys[::-1]


@pytest.mark.parametrize("name", POLICIES)
def test_a_parent_that_comes_after_its_child_still_goes_after_it(name: str) -> None:
    policy = POLICIES[name]()
    policy.on_insert(B, 1, A)
    policy.on_hit(B)
    policy.on_insert(A, 0)
    assert drain(policy) == [B, A]


def test_lru_takes_the_leaf_that_was_used_longest_ago() -> None:
    policy = Lru()
    for key in (A, B, C):
        policy.on_insert(key, 0)
    policy.on_hit(A)
    assert drain(policy) == [B, C, A]


def test_lfu_takes_the_leaf_that_was_used_least() -> None:
    policy = Lfu()
    for key in (A, B, C):
        policy.on_insert(key, 0)
    for key in (A, A, B):
        policy.on_hit(key)
    assert drain(policy) == [C, B, A]


def test_lfu_forgets_what_was_popular_once() -> None:
    policy = Lfu()
    policy.on_insert(key_of(0), 0)
    for _ in range(10):
        policy.on_hit(key_of(0))
    for n in range(1, 30):  # a stream of blocks, each used twice
        policy.on_insert(key_of(n), 0)
        policy.on_hit(key_of(n))
        victim = policy.victim()
        assert victim is not None
        policy.on_remove(victim)
        if victim == key_of(0):
            return
    pytest.fail("the block that nobody uses any more is still there")


def test_length_aware_takes_deep_blocks_first() -> None:
    policy = LengthAware()
    policy.on_insert(A, 200)
    policy.on_insert(B, 3)
    policy.on_insert(C, 40)
    assert drain(policy) == [A, C, B]


@pytest.mark.parametrize("name", POLICIES)
def test_held_blocks_are_no_victims_and_neither_is_what_leads_to_them(name: str) -> None:
    policy = POLICIES[name]()
    insert_chain(policy, [A, B])
    policy.on_insert(C, 0)
    policy.hold(B)
    assert policy.victim() == C
    policy.on_remove(C)
    assert policy.victim() is None
    policy.release(B)
    assert drain(policy) == [B, A]


def test_a_block_cannot_be_inserted_twice() -> None:
    policy = Lru()
    policy.on_insert(A, 0)
    with pytest.raises(InternalError):
        policy.on_insert(A, 0)


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="lru, lfu, length_aware"):
        make_policy("fifo")


@given(
    name=st.sampled_from(sorted(POLICIES)),
    steps=st.lists(
        st.tuples(st.sampled_from("iihhrvHR"), st.integers(0, 15), st.integers(0, 15)), max_size=200
    ),
)
@settings(max_examples=300, deadline=None)
def test_the_victim_is_the_least_of_all_free_leaves(
    name: str, steps: list[tuple[str, int, int]]
) -> None:
    policy = POLICIES[name]()
    parents: dict[bytes, bytes] = {}
    held: set[bytes] = set()
    for what, n, m in steps:
        key, parent = key_of(n + 1), key_of(m + 1) if m < n else NO_PARENT
        if what == "i" and key not in parents:
            policy.on_insert(key, n, parent)
            parents[key] = parent
        elif what == "v":
            victim = policy.victim()
            leaves = {k for k in parents if k not in held and k not in parents.values()}
            assert (victim is None) == (not leaves)
            if victim is not None:
                assert victim in leaves
                scores = {k: policy._entries[k].score for k in leaves}
                assert scores[victim] == min(scores.values())
                policy.on_remove(victim)
                del parents[victim]
        elif key in parents and what == "h":
            policy.on_hit(key)
        elif key in parents and what == "r":
            policy.on_remove(key)
            del parents[key]
            held.discard(key)
        elif key in parents and what == "H":
            policy.hold(key)
            held.add(key)
        elif key in parents and what == "R":
            policy.release(key)
            held.discard(key)
        assert len(policy) == len(parents)
        assert len(policy._heap) <= 2 * len(parents) + 65
