"""The split between prefill and decode: what the planner wants, and that it does not flutter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types.fleet import Role
from conductor.planner import Look, Move, Planner, PlannerOptions

OPTIONS = PlannerOptions()


def run(planner: Planner, looks: Iterable[Look], start: float = 0.0) -> list[tuple[float, Move]]:
    """What it wants when it is asked every `look_s`."""
    moves = []
    for number, look in enumerate(looks):
        now = start + number * planner.options.look_s
        move = planner.look(look, now)
        if move is not None:
            moves.append((now, move))
    return moves


def follow(
    planner: Planner, prefill: int, decode: int, demands: Iterable[tuple[float, float]]
) -> list[tuple[int, int]]:
    """The splits that it leads to, when each move is made at once."""
    splits = []
    for number, (prompts, answers) in enumerate(demands):
        look = Look(prefill, decode, prompts, answers)
        move = planner.look(look, number * planner.options.look_s)
        if move is not None:
            step = 1 if move.role is Role.PREFILL else -1
            prefill, decode = prefill + step, decode - step
        splits.append((prefill, decode))
    return splits


def test_it_strengthens_the_pool_that_is_short() -> None:
    moves = run(Planner(), [Look(2, 6, 3.0, 1.0)] * OPTIONS.agree)
    assert [move.role for _, move in moves] == [Role.PREFILL]
    assert "3P5D lowers the pressure from 1.50 to 1.00" in moves[0][1].reason
    moves = run(Planner(), [Look(6, 2, 1.0, 3.0)] * OPTIONS.agree)
    assert [move.role for _, move in moves] == [Role.DECODE]


def test_one_look_is_not_enough_and_neither_is_a_wish_that_changes() -> None:
    planner = Planner()
    assert run(planner, [Look(2, 6, 3.0, 1.0)] * (OPTIONS.agree - 1)) == []
    assert planner.look(Look(6, 2, 3.0, 1.0), OPTIONS.agree * OPTIONS.look_s) is None


def test_a_fleet_at_ease_is_left_alone() -> None:
    assert run(Planner(), [Look(1, 7, 0.4, 0.0)] * 100) == []


def test_after_a_move_nothing_is_judged_until_it_has_settled() -> None:
    moves = run(Planner(), [Look(2, 6, 5.0, 1.0)] * 60)
    times = [at for at, _ in moves]
    assert len(times) > 2
    waits = [b - a for a, b in itertools.pairwise(times)]
    assert min(waits) >= OPTIONS.settle_s


def test_each_pool_keeps_its_least() -> None:
    assert run(Planner(), [Look(2, 1, 9.0, 0.0)] * 20) == []
    assert run(Planner(), [Look(1, 2, 0.0, 9.0)] * 20) == []
    assert run(Planner(PlannerOptions(least=2)), [Look(2, 2, 9.0, 0.0)] * 20) == []


def test_a_burst_does_not_move_anybody() -> None:
    calm, burst = (1.2, 1.2), (3.5, 1.2)
    demands = [calm] * 30 + [burst] * 2 + [calm] * 30
    assert set(follow(Planner(), 2, 2, demands)) == {(2, 2)}


def test_it_follows_a_load_that_turns_round() -> None:
    demands = [(6.0, 1.0)] * 100 + [(1.0, 6.0)] * 150
    splits = follow(Planner(), 4, 4, demands)
    assert splits[99] == (6, 2)
    assert splits[-1] == (2, 6)


@settings(deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.floats(0, 20, allow_nan=False),
    st.floats(0, 20, allow_nan=False),
)
def test_a_steady_load_ends_in_rest_at_a_better_split(
    prefill: int, decode: int, prompts: float, answers: float
) -> None:
    """Every move lowers the pressure by the margin, so there are few, and none undoes another."""
    planner = Planner()
    splits = follow(planner, prefill, decode, [(prompts, answers)] * 250)
    path = [(prefill, decode), *splits]
    seen = [split for split, before in zip(path[1:], path, strict=False) if split != before]
    assert len(set(seen)) == len(seen), "it came back to where it was"
    pressures = [planner.pressure(*split) for split in ((prefill, decode), *seen)]
    for before, after in itertools.pairwise(pressures):
        assert after < before * (1 - OPTIONS.margin) + 1e-9
    assert sum(splits[-1]) == prefill + decode
    assert min(splits[-1]) >= 1


def test_it_says_how_many_workers_are_wanted_and_moves_none() -> None:
    planner = Planner(replace(OPTIONS, moves=False))
    assert planner.wanted is None
    for second in range(60):
        assert planner.look(Look(2, 6, 3.0, 0.0), float(second)) is None
    assert planner.wanted == (math.ceil(3.0 / OPTIONS.busy), OPTIONS.least)
