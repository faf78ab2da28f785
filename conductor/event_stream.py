"""The bytes of a server-sent event stream, and a sign of life while there is nothing to send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.types import Send

KEEPALIVE_HEADER = "x-keepalive-interval"  # seconds

# A comment, which every client of server-sent events ignores. No empty line follows: after an event
# with an id, OpenAI's SDK takes one for another event, without data.
_COMMENT = b": keep-alive\n"


def keepalive_headers(keepalive_s: float) -> dict[str, str]:
    """By which clients learn how long a stream may be silent."""
    return {KEEPALIVE_HEADER: f"{keepalive_s:g}"} if keepalive_s else {}


class EventStream:
    """One response. It begins with its first bytes: until then the request may fail with a status.

    `send` begins it, `direct_send` sends its body. After `keepalive_s` seconds without a byte a
    comment is sent, also before the first event; 0: never.
    """

    def __init__(self, send: Send, direct_send: Send, request_id: str, keepalive_s: float) -> None:
        self._send = send
        self._direct_send = direct_send
        self._request_id = request_id
        self._keepalive_s = keepalive_s
        self._beginning = asyncio.Lock()  # the first event and a comment may come together
        self._has_begun = False
        self._clock = asyncio.get_running_loop().time
        self._sent_at = self._clock()
        self.begun = False  # there is no way back to an error with a status

    async def send(self, body: bytes) -> None:
        """Whole lines."""
        if not self._has_begun:
            await self._begin()
        if body:
            self._sent_at = self._clock()
            await self._direct_send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes) -> None:
        """The last bytes."""
        await self.send(b"")
        await self._direct_send({"type": "http.response.body", "body": body, "more_body": False})

    @asynccontextmanager
    async def kept_alive(self) -> AsyncGenerator[None, None]:
        """Comments are sent in this context."""
        if not self._keepalive_s:
            yield
            return
        beating = asyncio.create_task(self._beat(), name="keep-alive")
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self) -> None:
        while True:
            last = self._sent_at
            await asyncio.sleep(last + self._keepalive_s - self._clock())
            if self._sent_at == last:
                await self.send(_COMMENT)

    async def _begin(self) -> None:
        self.begun = True
        async with self._beginning:
            if self._has_begun:
                return
            headers = {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
                "x-request-id": self._request_id,
                **keepalive_headers(self._keepalive_s),
            }
            raw = [(name.encode(), value.encode()) for name, value in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": raw})
            self._has_begun = True
