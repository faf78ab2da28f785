"""Running a request over HTTP: one body, or server-sent events; ends when the client goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError, InternalError
from baton.logs import traced
from conductor.answer_run import Delta
from conductor.dispatch import Usage
from conductor.event_stream import EventStream
from conductor.http_errors import JsonResponse, error_body, error_response
from conductor.openai_reply import Reply, usage_body
from conductor.request import Request
from conductor.resume import Bookmark
from conductor.service import Conductor

DIRECT_SEND = "baton.send"  # in the ASGI scope: the server's own `send`
SEND_GRACE_S = 10.0  # beyond the request's deadline, for a client that reads slowly

_MARK = "\0text\0"

log = logging.getLogger(__name__)

Results = AsyncGenerator[list[Delta] | Usage, None]


class GenerationResponse(Response):
    """Generates when it is sent. An error before the first token is an HTTP error; a later one
    ends the stream with an error event."""

    def __init__(self, conductor: Conductor, request: Request, reply: Reply) -> None:
        super().__init__()
        self._conductor = conductor
        self._request = request
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with traced(self._request.tracing.context):
            try:
                await until_gone(receive, self._run(scope, receive, send))
            except TimeoutError:
                log.warning("request %s: the client did not read its answer", self._request.id)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with (
            asyncio.timeout_at(self._request.deadline + SEND_GRACE_S),
            aclosing(self._conductor.generate(self._request)) as results,
        ):
            try:
                response = await self._respond(scope, results, send)
            except BatonError as error:
                response = error_response(error, self._request.id)
            except Exception as error:
                log.exception("request %s failed", self._request.id)
                response = error_response(error, self._request.id)
            if response is not None:
                await response(scope, receive, send)

    async def _respond(self, scope: Scope, results: Results, send: Send) -> Response | None:
        """Collect everything, then answer."""
        deltas: list[Delta] = []
        usage = Usage(0, 0, 0)
        async for result in results:
            if isinstance(result, Usage):
                usage = result
            else:
                deltas += result
        headers = {"x-request-id": self._request.id}
        return JsonResponse(self._reply.whole(deltas, usage), headers=headers)


class StreamResponse(GenerationResponse):
    """Server-sent events, one message to the socket for everything that one engine step gave."""

    def __init__(
        self,
        conductor: Conductor,
        request: Request,
        reply: Reply,
        include_usage: bool,
        usage_in_every_chunk: bool,
    ) -> None:
        super().__init__(conductor, request, reply)
        self._include_usage = include_usage
        self._every_chunk = usage_in_every_chunk
        self._tokens = sum(each.tokens for each in request.sent)
        self._bookmark = Bookmark(request)
        self._plain = not usage_in_every_chunk and reply.text_only
        self._around: dict[int, tuple[bytes, bytes]] = {}  # answer -> what encloses its texts

    async def _respond(self, scope: Scope, results: Results, send: Send) -> Response | None:
        keepalive_s = self._conductor.policy.keepalive_s
        stream = EventStream(send, scope.get(DIRECT_SEND, send), self._request.id, keepalive_s)
        opening = b""
        if not self._request.sent:  # who comes back has had it
            opening = b"".join(self._chunk_with_id(chunk) for chunk in self._reply.opening())
        last = b"data: [DONE]\n\n"
        async with stream.kept_alive():
            try:
                async for result in results:
                    await stream.send(opening + self._events(result))
                    opening = b""
            except Exception as error:
                if not stream.begun:
                    raise  # it has a status of its own
                if not isinstance(error, BatonError):
                    log.exception("request %s failed", self._request.id)
                last = _event(error_body(error))
        await stream.end(last)
        return None

    @property
    def _id(self) -> bytes:
        """The line that a client which loses its connection comes back with."""
        return b"id: %b\n" % self._bookmark.token.encode()

    def _events(self, result: list[Delta] | Usage) -> bytes:
        if isinstance(result, Usage):
            if not self._include_usage:
                return b""
            return self._id + _event(self._reply.frame([], result))
        if len(result) == 1:
            return self._delta_event(result[0])
        return b"".join(map(self._delta_event, result))

    def _delta_event(self, delta: Delta) -> bytes:
        self._bookmark.note(delta)
        if self._plain and delta.finish_reason is None:
            if not delta.text:
                return b""
            before, after = self._around.get(delta.index) or self._enclosing(delta.index)
            return self._id + before + orjson.dumps(delta.text) + after
        self._tokens += len(delta.tokens)
        chunk = self._reply.chunk(delta)
        return b"" if chunk is None else self._chunk_with_id(chunk)

    def _enclosing(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in the plain events of an answer."""
        chunk = self._reply.chunk(Delta(index, _MARK))
        if chunk is None:
            raise InternalError("a chunk with text was left out")
        before, _, after = self._chunk_event(chunk).rpartition(orjson.dumps(_MARK))
        self._around[index] = before, after
        return before, after

    def _chunk_with_id(self, chunk: dict[str, Any]) -> bytes:
        return self._id + self._chunk_event(chunk)

    def _chunk_event(self, chunk: dict[str, Any]) -> bytes:
        """Who asks for the usage gets the field in every chunk; it is null but in the last."""
        if self._every_chunk:
            usage = Usage(self._request.prompt_tokens, self._tokens, 0)
            chunk["usage"] = usage_body(usage)
        elif self._include_usage:
            chunk["usage"] = None
        return _event(chunk)


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; cancel it, and wait for its clean-up, when the client disconnects."""
    task = asyncio.create_task(work, name="generate")
    watcher = asyncio.create_task(_wait_disconnect(receive), name="watch-client")
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        await asyncio.wait({task, watcher})
    if not task.cancelled():
        task.result()


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
