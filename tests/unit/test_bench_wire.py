"""The benchmark's client parses what servers send, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.wire import Event, ResponseParser, WireError, read_event

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
PAYLOADS = [b'{"a": 1}', b'{"b": "x"}', b"[DONE]"]


def chunked(*bodies: bytes) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


RESPONSES = {
    "an event per chunk": chunked(*(b"data: %s\n\n" % payload for payload in PAYLOADS)),
    "all in one chunk": chunked(b"".join(b"data: %s\r\n\r\n" % payload for payload in PAYLOADS)),
    "until close": HEAD + b"\r\n" + b"".join(b"data:%s\n\n" % payload for payload in PAYLOADS),
    "comments between": chunked(*(b": ping\n\ndata: %s\n\n" % payload for payload in PAYLOADS)),
}


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES.keys())
@given(cuts=st.lists(st.integers(0, 400), max_size=12))
def test_pieces_do_not_matter(response: bytes, cuts: list[int]) -> None:
    parser = ResponseParser()
    places = [0, *sorted(min(cut, len(response)) for cut in cuts), len(response)]
    payloads: list[bytes] = []
    for start, end in itertools.pairwise(places):
        payloads += parser.feed(response[start:end])
    assert payloads == PAYLOADS
    assert parser.status == 200
    assert parser.ended == (b"chunked" in response)


def test_an_error_keeps_its_body() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 4\r\n\r\nno") == []
    assert parser.feed(b"pe") == []
    assert (parser.status, parser.body, parser.ended) == (400, b"nope", True)


@pytest.mark.parametrize(
    "data",
    [b"SSH-2.0-x\r\n\r\n", HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", b"x" * 70000],
    ids=["not HTTP", "no chunk size", "endless head"],
)
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        ResponseParser().feed(data)


def test_events() -> None:
    def event(**content: object) -> Event:
        return read_event(json.dumps(content).encode())

    assert event(choices=[{"text": "a", "finish_reason": None}]) == Event("a")
    assert event(choices=[{"text": "b", "finish_reason": "length"}]) == Event("b", finished=True)
    assert event(choices=[], usage={"completion_tokens": 3}).usage == {"completion_tokens": 3}
    assert event(error={"message": "broken"}).error == "broken"
    assert event(error="plain").error == "plain"
    assert read_event(b"[DONE]").finished
    for broken in (b"{", b"[1]"):
        with pytest.raises(WireError):
            read_event(broken)
