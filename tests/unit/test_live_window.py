"""Rolling windows: slots, sketches and what is spread over them, without a clock."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conductor.window import MAX_FLOWS, SLOT_S, SLOTS, Flow, Sketch, Slot, Window

TIMES = st.lists(st.floats(0, 400), min_size=1, max_size=60).map(sorted)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=300), st.floats(0, 1))
def test_quantiles_are_right_to_a_fortieth(values: list[float], share: float) -> None:
    sketch = Sketch()
    for value in values:
        sketch.add(value)
    exact = sorted(values)[max(math.ceil(share * len(values)), 1) - 1]
    (found,) = sketch.quantiles([share])
    assert found == pytest.approx(exact, rel=0.025)


def test_several_quantiles_come_in_one_pass() -> None:
    sketch = Sketch()
    for value in range(1, 1001):
        sketch.add(value)
    assert sketch.quantiles([0.0, 0.5, 0.9, 1.0]) == pytest.approx([1, 500, 900, 1000], rel=0.03)
    assert Sketch().quantiles([0.5]) == []


def test_the_slowest_of_few_is_their_p99() -> None:
    sketch = Sketch()
    for value in (0.01, 0.02, 0.5):
        sketch.add(value)
    assert sketch.quantiles([0.5, 0.9, 0.99]) == pytest.approx([0.02, 0.5, 0.5], rel=0.03)


def test_a_sketch_is_bounded_whatever_it_is_given() -> None:
    sketch, draw = Sketch(), random.Random(1)
    for _ in range(20_000):
        sketch.add(10 ** draw.uniform(-300, 300))
    sketch.add(0.0)
    sketch.add(-1.0)
    assert len(sketch) == 20_002
    assert len(sketch._counts) <= 2 * math.log(1e6) / math.log(1.05) + 2
    assert Sketch.merged([sketch, sketch])._counts == {k: 2 * n for k, n in sketch._counts.items()}


@given(TIMES)
def test_slots_follow_one_another_and_are_bounded(times: list[float]) -> None:
    window = Window(times[0])
    for now in times:
        window.current(now).requests += 1
        numbers = [slot.number for slot in window._slots]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[-1] == int(now // SLOT_S)
        assert len(numbers) <= SLOTS + 1
        assert len(list(window.history(now))) == SLOTS
    recent = [now for now in times if now // SLOT_S > times[-1] // SLOT_S - SLOTS - 1]
    assert sum(slot.requests for slot in window._slots) == len(recent)


@example([0.0, 5e-324], 1)
@given(TIMES, st.integers(1, 10_000))
def test_tokens_are_spread_and_none_is_lost(times: list[float], tokens: int) -> None:
    begin, end = times[0], times[-1]
    window = Window(begin)
    window.spread_tokens(tokens, begin, end)
    kept = window.last(end, SLOTS * SLOT_S + SLOT_S).total("tokens")
    if end > begin:
        share = min(1.0, (end - window._slots[0].number * SLOT_S) / (end - begin))
        assert kept == pytest.approx(tokens * share, rel=1e-6)
    window.spread_tokens(0, begin, end)
    assert window.last(end, SLOTS * SLOT_S + SLOT_S).total("tokens") == kept


def test_rates_are_of_the_time_that_has_passed() -> None:
    window = Window(100.0)
    for second in range(100, 160):
        window.current(second).requests += 2
    assert window.last(160.0, 60).rate("requests") == pytest.approx(2.0)
    assert window.last(160.0, 10).rate("requests") == pytest.approx(2.0)
    late = window.last(400.0, 60)
    assert late.rate("requests") == 0.0
    assert Window(7.0).last(7.0, 60).seconds == 1.0


def test_flows_of_a_slot_are_bounded() -> None:
    slot = Slot(0)
    for number in range(2 * MAX_FLOWS):
        slot.add_flow(Flow(f"worker-{number}", "store", "offer"), 10)
    slot.add_flow(Flow("worker-0", "store", "offer"), 5)
    assert len(slot.flows) == MAX_FLOWS
    assert slot.flows[Flow("worker-0", "store", "offer")] == 15
