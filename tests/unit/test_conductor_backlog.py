"""Prompts in line at a worker: who is ahead of whom, and for how long."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types.request import AttemptId
from conductor.backlog import EMPTY, PromptQueue


def attempt(number: int) -> AttemptId:
    return AttemptId(f"r{number}")


def test_a_prompt_that_is_overtaken_goes_on_with_what_is_left_of_it() -> None:
    queue = PromptQueue()
    queue.add(attempt(0), 100, 10.0, (0, 10.0), now=0.0)
    queue.add(attempt(1), 10, 1.0, (0, 5.0), now=4.0)
    backlog = queue.snapshot(4.0)
    assert [ahead.seconds for ahead in backlog.prompts] == [1.0, 6.0]
    assert backlog.free_at == 11.0
    assert queue.has_begun(attempt(0))
    queue.done(attempt(1), 5.0)
    assert queue.snapshot(6.0).free_at == 11.0


def test_who_overtakes_waits_for_nobody_but_holds_others_up() -> None:
    queue = PromptQueue()
    queue.add(attempt(0), 100, 10.0, (0, 10.0), now=0.0)
    queue.add(attempt(1), 50, 5.0, (0, 8.0), now=0.0)
    backlog = queue.snapshot(0.0)
    assert backlog.ahead_s(0.0, (0, 1.0)) == 0.0
    assert (backlog.behind((0, 1.0)), backlog.overtaken_s((0, 1.0))) == (2, 5.0)
    assert backlog.ahead_s(0.0, (0, 9.0)) == 5.0
    assert (backlog.behind((0, 9.0)), backlog.overtaken_s((0, 9.0))) == (1, 0.0)
    assert backlog.ahead_s(0.0, (0, 11.0)) == 15.0
    assert backlog.behind((0, 11.0)) == 0


def test_a_prompt_that_has_never_been_first_has_not_begun() -> None:
    queue = PromptQueue()
    queue.add(attempt(0), 100, 10.0, (0, 1.0), now=0.0)
    queue.add(attempt(1), 50, 5.0, (0, 2.0), now=0.0)
    assert (queue.has_begun(attempt(0)), queue.has_begun(attempt(1))) == (True, False)
    queue.done(attempt(0), 10.0)
    assert queue.has_begun(attempt(1))


prompts = st.tuples(st.integers(0, 2), st.floats(0, 20), st.floats(0.01, 30), st.floats(0, 3))


@given(st.lists(prompts, max_size=12), st.randoms())
def test_the_parts_add_up_whatever_comes_and_goes(
    asked: list[tuple[int, float, float, float]], dice: random.Random
) -> None:
    queue, now = PromptQueue(), 0.0
    live: list[int] = []
    for number, (priority, slack_s, seconds, pause_s) in enumerate(asked):
        now += pause_s
        queue.add(attempt(number), 1, seconds, (priority, now + slack_s), now)
        live.append(number)
        if dice.random() < 0.4:
            queue.done(attempt(live.pop(dice.randrange(len(live)))), now)
        backlog = queue.snapshot(now)
        assert (len(backlog.prompts), backlog.tokens) == (len(live), len(live))
        turns = [ahead.turn for ahead in backlog.prompts]
        assert turns == sorted(turns)
        if live:
            left_s = sum(ahead.seconds for ahead in backlog.prompts)
            assert backlog.free_at - now == pytest.approx(left_s, abs=1e-6)
            last = (3, 0.0)
            assert backlog.ahead_s(now, last) == pytest.approx(left_s, abs=1e-6)
    for number in live:
        assert queue.done(attempt(number), now)
    assert queue.snapshot(now) == EMPTY
