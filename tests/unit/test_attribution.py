"""The stages of TTFT: they never overlap, lie within it, and with the rest add up to it exactly."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from baton.types.request import Span
from conductor.attribution import FirstToken, align, behind_first, ttft_stages

WORKER = (Span("queue", 13.0, 14.0), Span("fetch", 14.0, 16.0), Span("prefill", 16.0, 19.0))
KNOWN = FirstToken(
    received_s=10.0,
    read_s=10.25,
    tokenized_s=11.0,
    first_sent_s=12.0,
    sent_s=12.0,
    adopted=False,
    heard_s=20.0,
    passed_s=20.5,
    spans=WORKER,
)

times = st.floats(0, 100, allow_nan=False)
named = st.sampled_from(["queue", "fetch", "prefill", "handoff", "decode", "first_step"])
spans = st.lists(
    st.builds(lambda name, a, b: Span(name, min(a, b), max(a, b)), named, times, times), max_size=6
)
any_known = st.builds(
    FirstToken,
    received_s=times,
    read_s=times,
    tokenized_s=times,
    first_sent_s=st.none() | times,
    sent_s=st.none() | times,
    adopted=st.booleans(),
    heard_s=st.none() | times,
    passed_s=st.none() | times,
    spans=spans,
)


def seconds(known: FirstToken, now_s: float = 30.0) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in ttft_stages(known, now_s)}


def test_every_part_of_the_way_has_a_stage() -> None:
    assert seconds(KNOWN) == {
        "read": 0.25,
        "tokenize": 0.75,
        "route": 1.0,
        "dispatch": 1.0,
        "queue": 1.0,
        "prefix_load": 2.0,
        "prefill": 3.0,
        "return": 1.0,
        "deliver": 0.5,
    }
    assert sum(seconds(KNOWN).values()) == 10.5


def test_what_failed_attempts_took_is_a_stage() -> None:
    retried = replace(KNOWN, first_sent_s=11.5)
    assert seconds(retried)["route"] == 0.5
    assert seconds(retried)["retries"] == 0.5
    assert sum(seconds(retried).values()) == 10.5


def test_a_load_that_compute_hides_is_no_stage() -> None:
    early = (WORKER[0], WORKER[1], Span("prefill", 14.5, 19.0))
    found = seconds(replace(KNOWN, spans=early))
    assert (found["prefix_load"], found["prefill"]) == (0.5, 4.5)


def test_steps_that_compute_for_others_are_a_stage() -> None:
    prefill = Span("prefill", 16.0, 19.0, (("tokens", 7), ("compute_us", 1_250_000)))
    found = seconds(replace(KNOWN, spans=(*WORKER[:2], prefill)))
    assert (found["batch_wait"], found["prefill"]) == (1.75, 1.25)
    longer = replace(prefill, counts=(("compute_us", 9_000_000),))
    found = seconds(replace(KNOWN, spans=(*WORKER[:2], longer)))
    assert (found["batch_wait"], found["prefill"]) == (0.0, 3.0)


def test_an_adopted_answer() -> None:
    found = seconds(replace(KNOWN, adopted=True, spans=()))
    assert found == {"read": 0.25, "tokenize": 0.75, "adopt": 9.0, "deliver": 0.5}


def test_so_far_nothing_is_known_of_the_worker() -> None:
    running = replace(KNOWN, heard_s=None, passed_s=None, spans=())
    assert seconds(running) == {"read": 0.25, "tokenize": 0.75, "route": 1.0}
    assert sum(seconds(replace(running, first_sent_s=None), now_s=10.5).values()) == 0.5


@pytest.mark.parametrize("skew_s", [-1000.0, -2.0, 0.5, 2.0, 1e6])
def test_another_machine_s_clock_moves_no_worker_before_its_start(skew_s: float) -> None:
    """How long everything in the worker took stays, and the messages keep what is left."""
    moved = [replace(s, start_s=s.start_s + skew_s, end_s=s.end_s + skew_s) for s in WORKER]
    found = seconds(replace(KNOWN, spans=moved))
    wanted = seconds(KNOWN)
    for name in ("queue", "prefix_load", "prefill"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-6)
    assert found["dispatch"] + found["return"] == pytest.approx(2.0, abs=1e-6)
    assert min(found["dispatch"], found["return"]) >= 0


def test_a_clock_that_runs_faster_is_cut_off() -> None:
    fast = [replace(s, start_s=s.start_s * 3, end_s=s.end_s * 3) for s in WORKER]
    found = ttft_stages(replace(KNOWN, spans=fast), 30.0)
    assert sum(stage.seconds for stage in found) == pytest.approx(10.5)
    assert {"dispatch", "queue"} <= {stage.name for stage in found}


@given(any_known, times)
def test_stages_never_overlap_and_never_exceed_the_whole(known: FirstToken, now_s: float) -> None:
    stages = ttft_stages(known, now_s)
    end_s = known.passed_s if known.passed_s is not None else now_s
    for stage in stages:
        assert known.received_s <= stage.start_s <= stage.end_s <= end_s
    for before, after in pairwise(stages):
        assert before.end_s <= after.start_s
    assert sum(stage.seconds for stage in stages) <= max(end_s - known.received_s, 0.0) + 1e-9


@given(
    st.lists(times, min_size=9, max_size=9, unique=True).map(sorted),
    st.floats(-1e6, 1e6),
    st.booleans(),
)
def test_when_all_is_told_nothing_is_left_over(
    at: list[float], skew_s: float, with_load: bool
) -> None:
    """Marks in the order in which things happen, and a worker whose clock is off by any amount."""
    assume(all(after - before > 1e-3 for before, after in pairwise(at)))
    names = ("queue", "fetch", "prefill") if with_load else ("queue", "prefill")
    marks = at[3 : 4 + len(names)]
    told = [
        Span(name, start + skew_s, end + skew_s)
        for name, (start, end) in zip(names, pairwise(marks), strict=True)
    ]
    known = FirstToken(
        at[0], at[1], at[2], at[2], at[2], False, at[7], at[8], told
    )  # the tokens are there when it is sent
    stages = ttft_stages(known, 0.0)
    assert sum(stage.seconds for stage in stages) == pytest.approx(at[8] - at[0], abs=1e-6)


@given(spans, times, times)
def test_aligned_spans_lie_between_send_and_receipt(
    own: list[Span], earliest_s: float, length_s: float
) -> None:
    aligned = align(own, earliest_s, earliest_s + length_s)
    for before, after in zip(own, aligned, strict=True):
        assert earliest_s - 1e-9 <= after.start_s <= after.end_s <= earliest_s + length_s
        assert after.end_s - after.start_s <= before.end_s - before.start_s + 1e-9


def test_the_second_token_waits_for_transfer_and_step() -> None:
    told = {
        "handoff": Span("handoff", 19.0, 21.0),
        "first_step": Span("first_step", 21.5, 22.0),
        "decode": Span("decode", 21.5, 40.0),
    }
    found = behind_first(told, (20.0, 40.0))
    assert [(s.name, s.seconds) for s in found] == [("exposed_transfer", 1.0), ("first_step", 0.5)]
    assert [s.name for s in behind_first({"first_step": told["first_step"]}, (20.0, 40.0))] == [
        "first_step"
    ]
