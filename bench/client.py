"""The client of all measurements: one connection per request, one streamed completion on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import orjson

from baton.bench.stats import Outcome
from baton.client.http import Usage
from baton.client.timing import Timing
from bench.shapes import word
from bench.wire import Event, ResponseParser, WireError, read_event


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt of token ids, answered with exactly `output_tokens` tokens, greedily. `request_id`
    is for baton, whose conductor keeps a trace under it."""

    prompt: tuple[int, ...]
    output_tokens: int
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how to ask a server. `text_only`: it takes prompts as text (see bench.shapes.word)
    and refuses fields that OpenAI's API does not have."""

    host: str
    port: int
    model: str
    text_only: bool = False

    def request(self, ask: Ask) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.output_tokens,
            "temperature": 0.0,
            "stream": True,
        }
        if self.text_only:
            body["prompt"] = " ".join(word(token) for token in ask.prompt)
        else:
            body["prompt"] = list(ask.prompt)
            body["ignore_eos"] = True
            body["stream_options"] = {"include_usage": True}
        if ask.request_id:
            body["request_id"] = ask.request_id
        content = orjson.dumps(body)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(content)}\r\n"
            "accept: text/event-stream\r\nconnection: close\r\n\r\n"
        )
        return head.encode() + content


@dataclass
class Exchange(asyncio.Protocol):
    """One request under way. `arrivals` grows by the loop's time of each event that has text.

    Use `start`, then await `done`; `close` gives up the answer (and the server notices).
    """

    ask: Ask
    arrivals: list[float] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = ResponseParser()
        self._usage: dict[str, Any] | None = None
        self._finished = False
        self._error: str | None = None
        self._transport: asyncio.Transport | None = None
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self.done: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def start(cls, target: Target, ask: Ask) -> Exchange:
        """Raises OSError when nothing listens there."""
        request = target.request(ask)
        exchange = cls(ask)
        exchange.started = exchange._loop.time()
        transport, _ = await exchange._loop.create_connection(
            lambda: exchange, target.host, target.port
        )
        transport.write(request)
        return exchange

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        now = self._loop.time()
        try:
            for payload in self._parser.feed(data):
                self._take(read_event(payload), now)
        except WireError as error:
            self._error = str(error)
            self.close()
        if self._parser.ended:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended = self._loop.time()
        if not self.done.done():
            self.done.set_result(None)
        for _, future in self._waiting:
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def events(self, count: int) -> None:
        """Wait until `count` events with text have come, or the answer has ended."""
        if len(self.arrivals) < count and not self.done.done():
            future: asyncio.Future[None] = self._loop.create_future()
            self._waiting.append((count, future))
            await future

    @property
    def error(self) -> str | None:
        """Why this is no complete answer; None if it is one. Valid when `done`."""
        if self._error is not None:
            return self._error
        if self._parser.status != 200:
            body = self._parser.body[:300].decode(errors="replace")
            return f"HTTP {self._parser.status}: {body}"
        if not self._finished:
            return "the stream ended before the answer was complete"
        if self.output_tokens != self.ask.output_tokens:
            return f"{self.output_tokens} tokens instead of {self.ask.output_tokens}"
        return None

    @property
    def output_tokens(self) -> int:
        """As the server counts; the number of events when it does not say."""
        if self._usage is None:
            return len(self.arrivals)
        return int(self._usage.get("completion_tokens") or 0)

    def outcome(self, origin: float, late_s: float = 0.0) -> Outcome:
        """`origin`: the loop's time at which the measured run began."""
        started_s, ended_s = self.started - origin, self.ended - origin
        if (error := self.error) is not None:
            return Outcome(started_s, ended_s, error=error, late_s=late_s)
        usage = self._usage or {}
        details = usage.get("prompt_tokens_details") or {}
        timing = Timing(
            tuple(arrival - self.started for arrival in self.arrivals),
            self.ended - self.started,
            Usage(
                int(usage.get("prompt_tokens") or len(self.ask.prompt)),
                self.output_tokens,
                int(details.get("cached_tokens") or 0),
            ),
        )
        return Outcome(started_s, ended_s, timing=timing, late_s=late_s)

    def _take(self, event: Event, now: float) -> None:
        if event.error is not None:
            self._error = event.error
        if event.text:
            self.arrivals.append(now)
            if self._waiting:
                self._wake()
        self._finished = self._finished or event.finished
        self._usage = event.usage or self._usage

    def _wake(self) -> None:
        due = [entry for entry in self._waiting if entry[0] <= len(self.arrivals)]
        for entry in due:
            self._waiting.remove(entry)
            if not entry[1].done():
                entry[1].set_result(None)


async def complete(
    target: Target, ask: Ask, origin: float, timeout_s: float, late_s: float = 0.0
) -> Outcome:
    """Ask and wait for the whole answer. Every failure, a timeout included, is in the outcome."""
    clock = asyncio.get_running_loop().time
    started = clock()
    try:
        exchange = await Exchange.start(target, ask)
    except OSError as error:
        return Outcome(started - origin, clock() - origin, error=f"connect: {error}", late_s=late_s)
    try:
        async with asyncio.timeout(timeout_s):
            await exchange.done
    except TimeoutError:
        ended_s = clock() - origin
        return Outcome(started - origin, ended_s, error=f"no end in {timeout_s:g} s", late_s=late_s)
    finally:
        exchange.close()
    return exchange.outcome(origin, late_s)


async def ready(host: str, port: int, path: str) -> bool:
    """Whether GET `path` answers 200 now. False also when nothing listens or answers in 2 s."""
    try:
        async with asyncio.timeout(2.0):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(
                    f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode()
                )
                first = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return first.split(b" ")[1:2] == [b"200"]
