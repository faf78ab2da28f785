"""Which blocks workers are expected to have, next to a model that compares key by key."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from baton.hashing import KEY_BYTES, block_keys, root_key
from baton.types.request import AttemptId
from conductor.expected import MOST_LOOKED_AT, ExpectedBlocks
from conductor.router import GROUP_BLOCKS, group_of

ROOT = root_key("m", "float32", 1)
WORKERS = ("p0", "p1")
LENGTHS = st.integers(0, 12)


def chain(length: int, other_from: int = 99) -> bytes:
    """Keys of a prompt of one-token blocks, of which those from `other_from` on are its own."""
    return b"".join(block_keys(ROOT, [int(n >= other_from) for n in range(length)], 1))


def give(
    expected: ExpectedBlocks, keys: bytes, worker: str, number: int = 0, priority: int = 0
) -> AttemptId:
    attempt = AttemptId("r", number)
    expected.add(attempt, group_of(keys), keys, worker, priority)
    return attempt


def ask(expected: ExpectedBlocks, keys: bytes, priority: int = 0) -> dict[str, int]:
    return dict(expected.blocks(group_of(keys), keys, priority))


def test_what_a_worker_was_given_is_expected_there_until_it_is_done() -> None:
    expected = ExpectedBlocks()
    first = give(expected, chain(10), "p0", 0)
    second = give(expected, chain(10, other_from=7), "p0", 1)
    give(expected, chain(6), "p1", 2)
    assert ask(expected, chain(12)) == {"p0": 10, "p1": 6}
    assert ask(expected, chain(12, other_from=7)) == {"p0": 10, "p1": 6}
    expected.done(first)
    assert ask(expected, chain(12)) == {"p0": 7, "p1": 6}
    expected.done(second)
    expected.done(second)
    assert ask(expected, chain(12)) == {"p1": 6}


def test_prompts_that_begin_otherwise_or_are_short_do_not_count() -> None:
    expected = ExpectedBlocks()
    give(expected, chain(10, other_from=GROUP_BLOCKS - 1), "p0", 0)
    give(expected, b"", "p1", 1)
    assert len(expected) == 1
    assert ask(expected, chain(10)) == ask(expected, b"") == {}


def test_a_more_urgent_prompt_does_not_wait_for_others() -> None:
    expected = ExpectedBlocks()
    give(expected, chain(10), "p0", priority=5)
    assert ask(expected, chain(10), priority=4) == {}
    assert ask(expected, chain(10), priority=5) == {"p0": 10}


def test_a_crowd_costs_no_more_than_the_latest_of_it() -> None:
    expected = ExpectedBlocks()
    for number in range(3 * MOST_LOOKED_AT):
        give(expected, chain(8), f"p{number}", number)
    assert len(ask(expected, chain(8))) == MOST_LOOKED_AT
    assert f"p{3 * MOST_LOOKED_AT - 1}" in ask(expected, chain(8))


class Prompts(RuleBasedStateMachine):
    """Any order of starts and ends."""

    given = Bundle("given")

    def __init__(self) -> None:
        super().__init__()
        self.expected = ExpectedBlocks()
        self.pending: dict[AttemptId, tuple[str, bytes, int]] = {}
        self.number = 0

    @rule(
        target=given,
        length=LENGTHS,
        other=LENGTHS,
        worker=st.sampled_from(WORKERS),
        priority=st.integers(0, 2),
    )
    def start(self, length: int, other: int, worker: str, priority: int) -> AttemptId:
        self.number += 1
        keys = chain(length, other)
        attempt = give(self.expected, keys, worker, self.number, priority)
        if keys:
            self.pending[attempt] = (worker, keys, priority)
        return attempt

    @rule(attempt=consumes(given))
    def end(self, attempt: AttemptId) -> None:
        self.expected.done(attempt)
        self.pending.pop(attempt, None)

    @rule(length=LENGTHS, other=LENGTHS, priority=st.integers(0, 2))
    def look(self, length: int, other: int, priority: int) -> None:
        keys = chain(length, other)
        want: dict[str, int] = {}
        for worker, held, level in self.pending.values():
            if keys and level <= priority and group_of(held) == group_of(keys):
                want[worker] = max(want.get(worker, 0), alike(keys, held))
        assert ask(self.expected, keys, priority) == want

    @invariant()
    def nothing_else_is_kept(self) -> None:
        assert len(self.expected) == len(self.pending)
        assert bool(self.expected._groups) is bool(self.pending)


def alike(keys: bytes, other: bytes) -> int:
    count = 0
    while (at := keys[count * KEY_BYTES : (count + 1) * KEY_BYTES]) and other[
        count * KEY_BYTES : (count + 1) * KEY_BYTES
    ] == at:
        count += 1
    return count


TestPrompts = Prompts.TestCase
