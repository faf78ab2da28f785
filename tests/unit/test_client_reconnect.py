"""The client goes on by itself when a stream breaks: elsewhere, with the last event's id."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing

import httpx
import pytest

from baton.client.http import Client, Prompt
from baton.client.reconnect import RECONNECTS
from baton.client.sse import Event, EventParser
from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InvalidRequest,
    NoWorker,
    Overloaded,
    PeerGone,
)
from tests.virtual_time import virtual_time

Handler = Callable[[httpx.Request], httpx.Response]
WORDS = ("one ", "two ", "three")


def event(number: int) -> bytes:
    choice = {"index": 0, "text": WORDS[number], "finish_reason": "stop" if number == 2 else None}
    return b"id: k:1:%d\ndata: %b\n\n" % (number + 1, json.dumps({"choices": [choice]}).encode())


REST = {"": 0, "k:1:1": 1, "k:1:2": 2, "k:1:3": 3}
DONE = b"data: [DONE]\n\n"


class Conductors:
    """`broken` says by host how a connection goes: how many bytes arrive before it breaks."""

    def __init__(self, **broken: list[int | httpx.Response | Exception]) -> None:
        self.broken = broken
        self.asked: list[tuple[str, str]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        host, last = request.url.host, request.headers.get("last-event-id", "")
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        self.asked.append((host, last))
        whole = b"".join(event(n) for n in range(REST[last], 3)) + DONE
        plan = self.broken.get(host)
        how = plan.pop(0) if plan else len(whole)
        if isinstance(how, Exception):
            raise how
        return how if isinstance(how, httpx.Response) else httpx.Response(200, content=whole[:how])


async def text_from(conductors: Conductors, urls: str, patience_s: float = 0.0) -> str:
    text = ""
    transport = httpx.MockTransport(conductors)
    async with (
        Client(urls, transport=transport, patience_s=patience_s) as client,
        aclosing(client.stream(Prompt("hi"))) as pieces,
    ):
        async for piece in pieces:
            text += piece.text
    return text


@virtual_time
async def test_a_stream_that_breaks_anywhere_is_whole_in_the_end() -> None:
    length = len(event(0) + event(1) + event(2))
    for cut in range(len(event(0)), length):
        conductors = Conductors(a=[cut])
        assert await text_from(conductors, "http://a,http://b") == "one two three"
        assert [host for host, _ in conductors.asked] == ["a", "b"]


@virtual_time
async def test_it_goes_round_and_waits_longer_and_longer() -> None:
    refused = httpx.ConnectError("refused")
    first = len(event(0))
    conductors = Conductors(a=[first, refused, refused], b=[refused, refused, refused])
    assert await text_from(conductors, "http://a,http://b") == "one two three"
    assert [host for host, _ in conductors.asked] == ["a", "b", "a", "b", "a", "b", "a"]
    assert {last for _, last in conductors.asked[1:]} == {"k:1:1"}
    assert 0.5 < asyncio.get_running_loop().time() < 5


@virtual_time
async def test_a_conductor_that_comes_back_needs_no_other_one() -> None:
    conductors = Conductors(a=[len(event(0)), httpx.ReadTimeout("silent"), len(event(1)) + 5])
    assert await text_from(conductors, "a") == "one two three"
    assert [last for _, last in conductors.asked] == ["", "k:1:1", "k:1:1", "k:1:2"]


@virtual_time
async def test_who_is_told_that_another_one_has_its_answer_takes_it_back() -> None:
    taken = b'data: {"error": {"message": "elsewhere", "code": "taken_over"}}\n\n'
    refused = httpx.Response(409, content=taken[6:])
    conductors = Conductors(a=[httpx.Response(200, content=event(0) + taken)], b=[refused])
    assert await text_from(conductors, "http://a,http://b") == "one two three"
    assert conductors.asked == [("a", ""), ("b", "k:1:1"), ("a", "k:1:1")]


@virtual_time
async def test_it_gives_up_in_the_end() -> None:
    conductors = Conductors(a=[len(event(0)), *[httpx.ConnectError("refused")] * 100])
    with pytest.raises(PeerGone):
        await text_from(conductors, "a")
    assert len(conductors.asked) == 1 + RECONNECTS


@virtual_time
async def test_streams_that_break_together_do_not_send_each_other_back() -> None:
    """All streams of a client lose a conductor at the same time. Each goes to the other one,
    whatever the others have done to the address in use."""
    arrived = asyncio.Barrier(4)

    async def ask(request: httpx.Request) -> httpx.Response:
        if request.method == "POST" and request.url.host == "a":
            await arrived.wait()
            raise httpx.ConnectError("refused")
        return Conductors()(request)

    async def one(client: Client) -> str:
        async with aclosing(client.stream(Prompt("hi"))) as pieces:
            return "".join([piece.text async for piece in pieces])

    async with Client("a,b", transport=httpx.MockTransport(ask)) as client:
        texts = await asyncio.gather(*(one(client) for _ in range(4)))
    assert set(texts) == {"one two three"}


@virtual_time
async def test_a_silent_stream_is_lost_when_there_is_another_address() -> None:
    """Three signs of life that the server has promised may be missing."""
    waits: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        response = Conductors()(request)
        if request.method == "GET":
            response.headers["x-keepalive-interval"] = "5"
            return response
        waits.append(request.extensions["timeout"]["read"])
        if len(waits) == 1:
            raise httpx.ReadTimeout("silent")
        return response

    async def read(urls: str, timeout_s: float) -> str:
        waits.clear()
        async with Client(urls, timeout_s, transport=httpx.MockTransport(answer)) as client:
            return "".join([piece.text async for piece in client.stream(Prompt("hi"))])

    assert await read("a,b", 120) == "one two three"
    assert waits == [15, 15]
    assert await read("a,b", 7) == "one two three"
    assert waits == [7, 7]
    with pytest.raises(DeadlineExceeded):
        await read("a", 120)
    assert waits == [120]


def failed(code: str) -> bytes:
    return b"data: %b\n\n" % json.dumps({"error": {"message": "no", "code": code}}).encode()


@virtual_time
@pytest.mark.parametrize(
    ("first", "kind", "asked"),
    [
        (httpx.Response(200, content=event(0) + failed("no_worker")), None, 2),
        (httpx.Response(200, content=event(0) + failed("internal_error")), BatonError, 1),
        (httpx.Response(200, content=failed("worker_lost")), BatonError, 1),
        (httpx.Response(503, json={"error": {"message": "no", "code": "no_worker"}}), None, 2),
        (httpx.Response(400, json={"error": {"message": "no"}}), InvalidRequest, 1),
        (httpx.ConnectError("refused"), None, 2),
    ],
)
async def test_what_is_worth_another_try(
    first: httpx.Response | Exception, kind: type[BatonError] | None, asked: int
) -> None:
    conductors = Conductors(a=[first])
    if kind is None:
        assert await text_from(conductors, "a,b") == "one two three"
    else:
        with pytest.raises(kind):
            await text_from(conductors, "a,b")
    assert len(conductors.asked) == asked


@virtual_time
async def test_one_address_without_an_event_fails_at_once() -> None:
    refusal = httpx.Response(503, json={"error": {"message": "no", "code": "no_worker"}})
    with pytest.raises(NoWorker):
        await text_from(Conductors(a=[refusal]), "a")
    assert asyncio.get_running_loop().time() == 0


def test_events_are_whole_or_not_there() -> None:
    stream = "id: 1\n: a comment\ndata: a\u2028b\n\ndata: c\r\n\r\nid: 2\ndata: d\n".encode()
    for size in (1, 3, 100):
        parser = EventParser()
        parts = [stream[at : at + size] for at in range(0, len(stream), size)]
        events = [event for part in parts for event in parser.feed(part)]
        assert events == [Event("1", "a\u2028b".encode()), Event("", b"c")]


def too_busy(headers: dict[str, str]) -> httpx.Response:
    return httpx.Response(429, json={"error": {"code": "overloaded"}}, headers=headers)


@virtual_time
@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "6200"}, 6.2),
        ({"retry-after": "Fri, 20 Nov 2026", "retry-after-ms": "nan"}, 1.0),
    ],
)
async def test_who_has_patience_asks_again_when_told(
    headers: dict[str, str], after_s: float
) -> None:
    began = asyncio.get_running_loop().time()
    conductors = Conductors(a=[too_busy(headers), too_busy(headers)])
    assert await text_from(conductors, "http://a", patience_s=20.0) == "one two three"
    assert len(conductors.asked) == 3
    assert asyncio.get_running_loop().time() - began == pytest.approx(2 * after_s, abs=1e-3)


@virtual_time
async def test_patience_is_for_all_of_the_waiting() -> None:
    conductors = Conductors(a=[too_busy({"retry-after": "7"}) for _ in range(9)])
    with pytest.raises(Overloaded):
        await text_from(conductors, "http://a", patience_s=20.0)
    assert len(conductors.asked) == 3
    with pytest.raises(Overloaded):
        await text_from(conductors, "http://a")
    assert len(conductors.asked) == 4
