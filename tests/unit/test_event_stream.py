"""Streams show that they are alive while there is nothing to send."""

from __future__ import annotations

import asyncio

import httpx
import openai
import orjson
import pytest
from starlette.types import Message

from baton.types.request import WireError
from conductor.cluster import ConductorIdentity
from conductor.event_stream import KEEPALIVE_HEADER, EventStream
from conductor.http import make_app
from conductor.service import Policy
from tests.fake_worker import FakeCluster, Scripts, fake_cluster, say
from tests.virtual_time import virtual_time

BEAT = ": keep-alive\n"
IDENTITY = ConductorIdentity("c", 1, "life", "127.0.0.1:1", "127.0.0.1:2", 0.0)


class Sent:
    """An ASGI `send` that keeps what it gets, and when. What begins a response takes `slow_s`."""

    def __init__(self, slow_s: float = 0.0) -> None:
        self.messages: list[tuple[float, Message]] = []
        self._slow_s = slow_s

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await asyncio.sleep(self._slow_s)
        self.messages.append((asyncio.get_running_loop().time(), message))

    @property
    def bodies(self) -> list[tuple[float, bytes]]:
        return [(at, message["body"]) for at, message in self.messages if "body" in message]


@virtual_time
async def test_a_comment_comes_whenever_nothing_was_sent_for_so_long() -> None:
    sent = Sent()
    stream = EventStream(sent, sent, "r", keepalive_s=5.0)
    async with stream.kept_alive():
        await asyncio.sleep(12)
        await stream.send(b"id: 1\ndata: a\n\n")
        await asyncio.sleep(4)
        await stream.send(b"id: 2\ndata: b\n\n")
        await asyncio.sleep(5.5)
    await asyncio.sleep(60)
    await stream.end(b"data: [DONE]\n\n")
    assert [at for at, body in sent.bodies if body == BEAT.encode()] == [5, 10, 21]
    assert sent.messages[0][1]["status"] == 200
    assert sum("status" in message for _, message in sent.messages) == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


@virtual_time
async def test_it_begins_once_when_the_first_event_and_a_comment_come_together() -> None:
    sent = Sent(slow_s=1.0)
    stream = EventStream(sent, sent, "r", keepalive_s=5.0)
    async with stream.kept_alive():
        await asyncio.sleep(5.5)  # the comment's turn has come, and the response is beginning
        await stream.send(b"data: a\n\n")
        assert ["status" in message for _, message in sent.messages] == [True, False, False]


@virtual_time
async def test_it_can_be_turned_off() -> None:
    sent = Sent()
    stream = EventStream(sent, sent, "r", keepalive_s=0.0)
    async with stream.kept_alive():
        await asyncio.sleep(1000)
        assert not sent.messages
        await stream.send(b"data: a\n\n")
    assert KEEPALIVE_HEADER.encode() not in dict(sent.messages[0][1]["headers"])


async def ask(cluster: FakeCluster, stream: bool = True) -> httpx.Response:
    app = make_app(cluster.conductor, IDENTITY, 1000)
    body = {"model": "tiny", "prompt": "x", "stream": stream}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://c") as http:
        return await http.post("/v1/completions", json=body)


def policy() -> Policy:
    return Policy(lease_ttl_s=1e6, keepalive_s=5.0)


def broken(prefill_s: float) -> Scripts:
    return say("hi", prefill_s=prefill_s, error_at=0, error=WireError("internal_error", "no"))


@virtual_time
async def test_a_long_prefill_is_not_silent() -> None:
    async with fake_cluster(say("hi", prefill_s=12.0), policy=policy()) as cluster:
        answer = await ask(cluster)
        assert answer.headers[KEEPALIVE_HEADER] == "5"
        assert answer.text.startswith(2 * BEAT + "id: ")
        assert answer.text.count(BEAT) == 2
        whole = await ask(cluster, stream=False)
        assert whole.json()["choices"][0]["text"] == "hi"
        assert KEEPALIVE_HEADER not in whole.headers
        await cluster.check_nothing_left()


@virtual_time
async def test_an_error_has_a_status_as_long_as_it_can() -> None:
    async with fake_cluster(broken(prefill_s=4.0), policy=policy()) as cluster:
        answer = await ask(cluster)
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "no"
    async with fake_cluster(broken(prefill_s=6.0), policy=policy()) as cluster:
        answer = await ask(cluster)
        assert answer.status_code == 200
        beat, data = answer.text.removesuffix("\n\n").split("\n")
        assert beat + "\n" == BEAT
        assert orjson.loads(data.removeprefix("data: "))["error"]["message"] == "no"
        await cluster.check_nothing_left()


@virtual_time
async def test_the_models_tell_how_long_a_stream_may_be_silent() -> None:
    async with fake_cluster(policy=policy()) as cluster:
        transport = httpx.ASGITransport(make_app(cluster.conductor, IDENTITY, 1000))
        async with httpx.AsyncClient(transport=transport, base_url="http://c") as http:
            assert (await http.get("/v1/models")).headers[KEEPALIVE_HEADER] == "5"


@pytest.mark.parametrize("chunk", [1, 7, 1000])
async def test_openais_sdk_does_not_see_the_comments(chunk: int) -> None:
    """It takes an empty line after an event with an id for another event."""
    event = b'id: k:%d\ndata: {"choices":[{"index":0,"text":"a"}]}\n\n'
    body = BEAT.encode() * 2 + b"".join(event % n + BEAT.encode() for n in range(3))
    body += b"data: [DONE]\n\n"

    async def parts() -> object:
        for at in range(0, len(body), chunk):
            yield body[at : at + chunk]

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=parts(), headers={"content-type": "text/event-stream"})  # type: ignore[arg-type]

    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http,
        openai.AsyncOpenAI(
            base_url="http://c/v1",
            api_key="none",
            http_client=http,  # type: ignore[arg-type]
        ) as client,
    ):
        chunks = await client.completions.create(model="m", prompt="x", stream=True)
        assert "".join([c.choices[0].text async for c in chunks]) == "aaa"
