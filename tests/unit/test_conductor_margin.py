"""How much smaller than the limit a prediction must be."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conductor.margin import Margin


def test_nineteen_in_twenty_keep_the_limit() -> None:
    margin, draw = Margin(1.0), Random(1)
    for _ in range(200):
        margin.add(0.95, 0.95 * draw.gauss(1.0, 0.05), 0.0)
    assert margin.factor == pytest.approx(1.0 + 1.64 * 0.05, rel=0.03)
    most = 1.0 / margin.factor  # that is let in
    late = sum(most * draw.gauss(1.0, 0.05) > 1.0 for _ in range(10_000))
    assert 200 < late < 1000


def test_few_predictions_make_no_margin() -> None:
    margin = Margin(1.0)
    for _ in range(15):
        margin.add(0.9, 1.8, 0.0)
    assert margin.factor == 1.0
    margin.add(0.9, 1.8, 0.0)
    assert margin.factor == 2.0


def test_predictions_far_from_the_limit_do_not_count() -> None:
    margin = Margin(1.0)
    for _ in range(100):
        margin.add(0.01, 0.03, 0.0)  # nothing to lose
    assert margin.factor == 1.0


def test_predictions_that_are_kept_make_no_bonus() -> None:
    margin = Margin(1.0)
    for _ in range(100):
        margin.add(0.9, 0.5, 0.0)
    assert margin.factor == 1.0
    assert margin.late_s(1.01) > 0 > margin.late_s(0.99)


def test_an_accident_is_forgotten_also_when_little_is_let_in_after_it() -> None:
    margin = Margin(1.0)
    for _ in range(64):
        margin.add(0.9, 60.0, 0.0)  # a worker stood still
    assert margin.factor == 2.0
    for _ in range(64):
        margin.add(0.5 / margin.factor + 0.01, 0.1, 0.0)
    assert margin.factor == 1.0


def test_an_accident_is_forgotten_with_time_when_nobody_is_let_in_after_it() -> None:
    margin = Margin(1.0)
    for number in range(64):
        margin.add(0.9, 60.0, number / 64)
    margin.forget(60.5)
    assert margin.factor == 2.0  # half of them are within the last minute
    margin.forget(61.0)
    assert margin.factor == 1.0
    margin.add(0.9, 0.9, 62.0)
    assert margin.factor == 1.0


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), max_size=200))
def test_whatever_comes_it_stays_within_bounds(samples: list[tuple[float, float]]) -> None:
    margin = Margin(0.5)
    for predicted_s, actual_s in samples:
        margin.add(predicted_s, actual_s, 0.0)
        assert 1.0 <= margin.factor <= 2.0
