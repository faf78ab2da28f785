"""The ring of timelines: bounded in number and in bytes."""

from __future__ import annotations

from baton.types.fleet import Peer
from baton.types.registry import AnswerPlace
from baton.types.request import AttemptId, Span
from baton.types.trace import TraceContext
from conductor.request import Request, Tracing
from conductor.trace import ENTRY_BYTES, TIMELINE_BYTES, Timeline, Traces

SPAN = Span("decode", 1.0, 2.0)


def request(name: str) -> Request:
    tracing = Tracing(TraceContext("7" * 32, "8" * 16, sampled=False), None, 0.0, 0.0)
    return Request(name, name, "m", (), (), True, 0, "", None, 0.0, 9.0, "chat", tracing)


def kept(traces: Traces, count: int) -> list[str]:
    return [f"r{n}" for n in range(count) if traces.get(f"r{n}") is not None]


def fill(timeline: Timeline, spans: int) -> None:
    for _ in range(spans):
        timeline.add_span("decode-0", "r#0", SPAN)


def test_the_oldest_go_when_there_are_too_many() -> None:
    traces = Traces(0.0, capacity=3)
    for n in range(5):
        traces.begin(request(f"r{n}"))
    assert kept(traces, 5) == ["r2", "r3", "r4"]
    assert traces.nbytes == 3 * TIMELINE_BYTES


def test_the_oldest_go_when_one_grows_large() -> None:
    room = 3 * TIMELINE_BYTES + 100 * ENTRY_BYTES
    traces = Traces(0.0, max_bytes=room)
    timelines = [traces.begin(request(f"r{n}")) for n in range(3)]
    fill(timelines[1], 100)
    assert kept(traces, 3) == ["r0", "r1", "r2"]
    fill(timelines[2], 1)
    assert kept(traces, 3) == ["r1", "r2"]
    fill(timelines[2], 10)
    assert kept(traces, 3) == ["r2"]
    assert traces.nbytes == timelines[2].nbytes == TIMELINE_BYTES + 11 * ENTRY_BYTES
    fill(timelines[0], 1000)  # its request goes on; nobody can ask for it any more
    assert traces.nbytes == timelines[2].nbytes


def test_one_that_is_larger_than_all_may_be_is_not_kept() -> None:
    traces = Traces(0.0, max_bytes=10 * ENTRY_BYTES)
    timeline = traces.begin(request("r0"))
    fill(timeline, 20)
    assert (len(traces), traces.nbytes) == (0, 0)
    assert len(timeline.spans) == 20


def test_a_request_that_comes_back_replaces_its_timeline() -> None:
    traces = Traces(0.0)
    fill(traces.begin(request("r0")), 5)
    again = traces.begin(request("r0"))
    again.adopt_attempt(AnswerPlace(AttemptId("r0.0", 1), Peer("d", "life", "d:1")), 1.0)
    again.end_attempt(AttemptId("r0.0", 1), "complete", 2.0)
    assert traces.get("r0") is again
    assert traces.nbytes == again.nbytes == TIMELINE_BYTES + ENTRY_BYTES + len("complete")
