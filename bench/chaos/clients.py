"""Clients as users have them: they stream an answer, and come back when a stream breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx

from baton.client.http import Client
from baton.errors import BatonError
from bench.chaos.questions import Question

EVENT_TIMEOUT_S = 20.0  # after which a client gives a silent conductor up
ANSWER_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Asking:
    """One request under way. `run` fills it in; times are of the event loop."""

    question: Question
    urls: Sequence[str]
    breaks: bool = False  # its connection breaks once, in the middle of the answer
    tokens: list[int] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    async def has_ended(self) -> bool:
        return bool(self.ended)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.began = loop.time()
        transport = (BreakingTransport if self.breaks else httpx.AsyncHTTPTransport)(verify=False)
        try:
            async with (
                asyncio.timeout(ANSWER_TIMEOUT_S),
                Client(",".join(self.urls), EVENT_TIMEOUT_S, transport=transport) as client,
            ):
                async for piece in client.stream(self.question.as_prompt()):
                    self.tokens += piece.token_ids
        except BatonError as error:
            self.error = f"{error.code}: {error.message}"
        except TimeoutError:
            self.error = f"no end within {ANSWER_TIMEOUT_S:g} s"
        finally:
            self.ended = loop.time()


class BreakingTransport(httpx.AsyncHTTPTransport):
    """The first streamed answer breaks off after some reads, as when a laptop changes networks."""

    def __init__(self, verify: bool = True, reads: int = 12) -> None:
        super().__init__(verify=verify)
        self._reads = reads

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if request.method == "POST" and self._reads:
            response.stream = _Cut(response.stream, self._reads)
            self._reads = 0
        return response


class _Cut(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream | httpx.AsyncByteStream, reads: int) -> None:
        assert isinstance(stream, httpx.AsyncByteStream)
        self._stream = stream
        self._reads = reads

    async def __aiter__(self) -> AsyncIterator[bytes]:
        reads = 0
        async for part in self._stream:
            reads += 1
            if reads > self._reads:
                raise httpx.ReadError("the connection was cut for the test")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
