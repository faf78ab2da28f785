"""The client against answers that a test writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing

import httpx
import pytest

from baton.client.errors import error_from
from baton.client.http import Client, Piece, Prompt, Usage
from baton.client.timing import Stopwatch, Timing
from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NoWorker,
    Overloaded,
    PeerGone,
    WorkerLost,
)
from tests.unit.fake_cluster import EVENTS, sse

Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> Client:
    return Client("http://cluster/", transport=httpx.MockTransport(handler))


def answering(body: bytes, status: int = 200) -> Handler:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "first"}]})
        return httpx.Response(status, content=body)

    return handle


async def pieces_of(handler: Handler, prompt: Prompt) -> list[Piece]:
    async with client(handler) as asking, aclosing(asking.stream(prompt)) as stream:
        return [piece async for piece in stream]


async def test_a_stream_of_text_and_usage() -> None:
    pieces = await pieces_of(answering(sse(EVENTS)), Prompt("hi", max_tokens=2))
    assert "".join(piece.text for piece in pieces) == "hello world"
    assert [piece.finish_reason for piece in pieces] == [None, "length", None]
    assert pieces[-1].usage == Usage(3, 2, cached_tokens=1)
    assert {piece.request_id for piece in pieces} == {"r1"}


async def test_an_address_without_scheme_means_http() -> None:
    for url in ("cluster:8000", "http://cluster:8000/"):
        async with Client(url) as asking:
            assert asking.url == "http://cluster:8000"


async def test_any_text_may_be_asked_for_as_a_trace() -> None:
    seen = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.raw_path)
        return httpx.Response(200, json={})

    async with client(handle) as asking:
        await asking.trace("a/b?c#d")
    assert seen == [b"/trace/a%2Fb%3Fc%23d"]


async def test_the_request_says_what_the_prompt_says() -> None:
    seen = {}

    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            seen[request.url.path] = json.loads(request.content)
        return answering(sse(EVENTS))(request)

    await pieces_of(handle, Prompt((5, 6), max_tokens=2, options={"ignore_eos": True}))
    chat = Prompt(({"role": "user", "content": "x"},), chat=True, model="other")
    await pieces_of(handle, chat)
    assert seen["/v1/completions"]["prompt"] == [5, 6]
    assert seen["/v1/completions"]["model"] == "first"
    assert seen["/v1/completions"]["ignore_eos"] is True
    assert seen["/v1/completions"]["stream_options"] == {"include_usage": True}
    assert seen["/v1/chat/completions"]["messages"] == [{"role": "user", "content": "x"}]
    assert seen["/v1/chat/completions"]["model"] == "other"
    assert "max_tokens" not in seen["/v1/chat/completions"]


async def test_chat_reads_deltas_and_skips_the_role() -> None:
    deltas = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "yes"}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    pieces = await pieces_of(answering(sse(deltas)), Prompt((), chat=True))
    assert [(piece.text, piece.finish_reason) for piece in pieces] == [("yes", None), ("", "stop")]


async def test_an_error_inside_a_stream_is_raised() -> None:
    lost = {"error": {"message": "decode-0 died", "code": "worker_lost", "type": "server_error"}}
    with pytest.raises(WorkerLost, match="decode-0 died"):
        await pieces_of(answering(sse([EVENTS[0], lost], done=False)), Prompt("x"))


async def test_a_stream_that_breaks_off_is_an_error() -> None:
    with pytest.raises(PeerGone, match="before the answer was complete"):
        await pieces_of(answering(sse(EVENTS[:1], done=False)), Prompt("x"))


async def test_what_is_not_json_is_an_error() -> None:
    with pytest.raises(InternalError, match="not JSON"):
        await pieces_of(answering(b"data: {oops\n\n"), Prompt("x"))
    with pytest.raises(InternalError, match="not an object"):
        async with client(answering(b"[]")) as asking:
            await asking.cluster()


@pytest.mark.parametrize(
    ("status", "detail", "kind"),
    [
        (404, {"code": "model_not_found", "message": "no"}, ModelNotFound),
        (400, {"code": "context_length_exceeded", "message": "no"}, InvalidRequest),
        (400, {"type": "invalid_request_error", "message": "no"}, InvalidRequest),
        (429, {"message": "no"}, Overloaded),
        (503, {"message": "no"}, NoWorker),
        (500, {"message": "no"}, InternalError),
    ],
)
def test_error_bodies_become_our_errors(
    status: int, detail: dict[str, str], kind: type[BatonError]
) -> None:
    error = error_from(status, json.dumps({"error": detail}).encode(), {"retry-after": "2.5"})
    assert type(error) is kind
    assert error.message == "no"
    if isinstance(error, Overloaded):
        assert error.retry_after_s == 2.5
    if detail.get("code") == "context_length_exceeded":
        assert error.code == "context_length_exceeded"


def test_error_bodies_of_strangers() -> None:
    assert "502" in error_from(502, b"<html>bad gateway</html>", {}).message
    assert isinstance(error_from(429, b"", {"retry-after": "Fri, 20 Nov 2026"}), Overloaded)
    assert "500" in error_from(500, b'"text"', {}).message


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (httpx.ConnectError("refused"), PeerGone, "baton serve"),
        (httpx.ReadTimeout("slow"), DeadlineExceeded, "in time"),
        (httpx.ReadError(""), PeerGone, "ReadError"),
    ],
)
async def test_a_failed_connection(raised: Exception, kind: type[BatonError], text: str) -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        raise raised

    async with client(handle) as asking:
        with pytest.raises(kind, match=text):
            await asking.cluster()
        assert not await asking.ready()


async def test_the_stopwatch_sees_tokens_and_not_usage() -> None:
    watch = Stopwatch()
    async with client(answering(sse(EVENTS))) as asking:
        async for _ in watch.watch(asking.stream(Prompt("x"))):
            pass
    timing = watch.timing
    assert len(timing.arrivals_s) == 2
    assert timing.usage.completion_tokens == 2
    assert timing.request_id == "r1"
    assert timing.ttft_s <= timing.end_s


def test_timing_arithmetic() -> None:
    timing = Timing((0.5, 0.6, 0.9), end_s=1.0, usage=Usage(7, 5, 2))
    assert timing.ttft_s == 0.5
    assert timing.tpot_s == pytest.approx(0.1)
    assert timing.tokens_per_s == 5
    assert timing.itl_s == pytest.approx((0.1, 0.3))
    assert "TTFT 500 ms" in timing.describe()
    assert "5 tokens from 7 (2 cached)" in timing.describe()


def test_timing_of_an_answer_of_one_token_or_none() -> None:
    assert Timing((0.5,), 0.5, Usage(1, 1)).tpot_s is None
    empty = Timing((), 0.25, Usage(1, 0))
    assert (empty.ttft_s, empty.tpot_s, empty.itl_s) == (0.25, None, ())
    assert "TPOT -" in empty.describe()
    assert Timing((), 0.0, Usage(0, 0)).tokens_per_s == 0
