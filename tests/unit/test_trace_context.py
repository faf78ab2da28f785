"""W3C Trace Context: what is well-formed is taken up, whatever else is there is ignored."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types.trace import (
    MAX_STATE,
    TraceContext,
    parse_trace_context,
    span_id_of,
    trace_id_of,
)
from conductor.request import begin_trace

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
GOOD = f"00-{TRACE}-{SPAN}-01"

ids = st.integers(1, 2**128 - 1).map("{:032x}".format)
spans = st.integers(1, 2**64 - 1).map("{:016x}".format)
contexts = st.builds(TraceContext, ids, spans, st.booleans())


@given(contexts)
def test_what_we_write_is_what_we_read(context: TraceContext) -> None:
    assert parse_trace_context([context.traceparent], []) == context


@given(st.text() | st.text("0123456789abcdef-", min_size=50, max_size=60))
def test_any_text_is_a_context_or_ignored(text: str) -> None:
    found = parse_trace_context([text], [text])
    if found is not None:
        assert text[3:52] == found.traceparent[3:52]
        assert text[:2] != "ff"


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        GOOD.upper(),
        f" {GOOD}",
        f"{GOOD}-00",  # version 00 ends with its flags
        f"{GOOD}\n",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01more",
        f"0x-{TRACE}-{SPAN}-01",
    ],
)
def test_malformed_parents_are_ignored(wrong: str) -> None:
    assert parse_trace_context([wrong], ["a=1"]) is None


def test_of_a_newer_version_what_is_known_counts() -> None:
    found = parse_trace_context([f"cc-{TRACE}-{SPAN}-09-what-comes"], [])
    assert found == TraceContext(TRACE, SPAN, sampled=True)


def test_two_parents_are_none() -> None:
    assert parse_trace_context([GOOD, GOOD], []) is None
    assert parse_trace_context([], ["a=1"]) is None


@pytest.mark.parametrize("flags", ["00", "02", "fe"])
def test_the_client_decides_that_it_is_not_sampled(flags: str) -> None:
    found = parse_trace_context([f"00-{TRACE}-{SPAN}-{flags}"], [])
    assert found is not None
    assert not found.sampled


@pytest.mark.parametrize(
    ("headers", "state"),
    [
        (["rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"], "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE"),
        (["a=1", "b@c=2 3"], "a=1,b@c=2 3"),
        (["a=1 ,\t b=2,,"], "a=1,b=2"),
        (["a=1,a=2"], ""),
        (["A=1"], ""),
        (["a=x=y"], ""),
        (["a="], ""),
        (["a=ä"], ""),
        ([",".join(f"k{n}=1" for n in range(33))], ""),
        ([f"a={'x' * 250},b={'x' * 250},c={'x' * MAX_STATE}"], ""),
    ],
)
def test_state_is_passed_on_or_left_out_as_a_whole(headers: list[str], state: str) -> None:
    found = parse_trace_context([GOOD], headers)
    assert found == TraceContext(TRACE, SPAN, sampled=True, state=state)


def test_a_request_is_a_child_of_its_client_s_span() -> None:
    caller = TraceContext(TRACE, SPAN, sampled=False, state="a=1")
    own = begin_trace("cmpl-1.x", caller, sample=1.0)
    assert own == TraceContext(TRACE, span_id_of("cmpl-1.x"), sampled=False, state="a=1")


@given(st.text())
def test_without_a_client_s_trace_one_begins(name: str) -> None:
    context = begin_trace(name, None, sample=1.0)
    assert context == TraceContext(trace_id_of(name), span_id_of(name), sampled=True)
    assert parse_trace_context([context.traceparent], []) == context
    assert re.fullmatch("[0-9a-f]{16}", context.child("a").span_id)
    assert len({context.span_id, context.child("a").span_id, context.child("b").span_id}) == 3


def test_so_many_of_our_own_traces_are_sampled() -> None:
    sampled = sum(begin_trace(f"r{n}", None, sample=0.1).sampled for n in range(4000))
    assert sampled == pytest.approx(400, abs=80)
    assert not any(begin_trace(f"r{n}", None, sample=0.0).sampled for n in range(100))
