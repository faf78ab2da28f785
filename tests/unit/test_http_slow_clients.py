"""Clients that stop reading their streams, over real sockets with small buffers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import orjson
import pytest

from baton.types.request import GenerationTask
from conductor import server
from tests.fake_worker import EOS, FakeCluster, Script, fake_server, wait_for

SMALL = 4096  # bytes of a socket's buffer
TOKENS = 400
ANSWERS = 8  # their streams have more bytes than uvicorn and both sockets hold


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    def listen(host: str, port: int) -> socket.socket:
        listener = whole(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        return listener

    whole = server.listen
    monkeypatch.setattr(server, "listen", listen)
    monkeypatch.setattr(server, "UNREAD_S", 0.3)


def long_for_some(task: GenerationTask) -> Script:
    """Long answers never end by themselves: only a cancel frees them."""
    if len(task.prompt) < 10:
        return Script((*b"short", EOS))
    return Script((ord("x"),) * (TOKENS + 1), hang_at=TOKENS)


@asynccontextmanager
async def stuck_client(cluster: FakeCluster) -> AsyncIterator[None]:
    """Asks for much, and reads nothing."""
    body = orjson.dumps(
        {"model": "tiny", "prompt": "x" * 10, "n": ANSWERS, "stream": True, "max_tokens": 500}
    )
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    loop = asyncio.get_running_loop()
    host, _, port = cluster.http.rpartition(":")
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, head.encode() + b"\r\n" + body)
        yield


async def test_a_client_that_stops_reading_is_cut_off_and_others_go_on() -> None:
    async with fake_server(long_for_some) as cluster, stuck_client(cluster):
        await wait_for(lambda: cluster.conductor.running == 1)
        async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as others:
            for _ in range(3):
                reply = await others.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
                assert reply.json()["choices"][0]["text"] == "short"
        await wait_for(lambda: len(cluster.workers["decode-0"].cancelled) == ANSWERS)
        await cluster.check_nothing_left()  # long before the deadline, and the client is there
