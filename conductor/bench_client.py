"""An HTTP client for load: it looks for the end of an answer, and reads nothing before that."""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass

import orjson

from baton.errors import PeerGone

_LAST_CHUNK = b"0\r\n\r\n"  # no event and no head of ours ends so


@dataclass(frozen=True, slots=True)
class Reply:
    """`first_s` and `end_s`: seconds from the request to the first and last bytes of the body."""

    first_s: float
    end_s: float
    status: bytes
    body: bytes  # as it was sent, with the marks of its chunks

    @property
    def is_ok(self) -> bool:
        return self.status == b"200"


def request_bytes(host: str, path: str, body: object) -> bytes:
    content = orjson.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(content)}\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + content


class Connection(asyncio.Protocol):
    """Kept alive; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._left: int | None = None  # bytes to come of a body whose length is known
        self._sent = self._first = 0.0
        self._answer: asyncio.Future[Reply] | None = None

    @classmethod
    async def open(cls, address: str, tls: ssl.SSLContext | None = None) -> Connection:
        host, _, port = address.rpartition(":")
        _, made = await asyncio.get_running_loop().create_connection(cls, host, int(port), ssl=tls)
        return made

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> Reply:
        assert self._transport is not None
        assert self._answer is None
        self._parts, self._left, self._first = [], None, 0.0
        self._answer = asyncio.get_running_loop().create_future()
        self._sent = time.perf_counter()
        self._transport.write(request)
        try:
            return await self._answer
        finally:
            self._answer = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(PeerGone("the conductor closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if not self._first:
            self._begin()
        elif self._left is not None:
            self._left -= len(data)
        tail = data if len(data) >= len(_LAST_CHUNK) else b"".join(self._parts[-len(_LAST_CHUNK) :])
        done = self._left == 0 if self._left is not None else tail.endswith(_LAST_CHUNK)
        if done and self._answer is not None and not self._answer.done():
            self._answer.set_result(self._reply())

    def _begin(self) -> None:
        """The head of an answer has come, perhaps in parts, perhaps with a part of the body."""
        head, found, body = b"".join(self._parts).partition(b"\r\n\r\n")
        if not found:
            return
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                self._left = int(value) - len(body)
        if body:
            self._first = time.perf_counter()

    def _reply(self) -> Reply:
        whole = b"".join(self._parts)
        first, end = self._first - self._sent, time.perf_counter() - self._sent
        return Reply(first, end, whole[9:12], whole.partition(b"\r\n\r\n")[2])
