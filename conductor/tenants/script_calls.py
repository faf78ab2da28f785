"""Calls of Redis scripts: all that wait at a time go in one round trip, over one connection.

A burst of requests then costs Redis as many scripts, and us one wait; with a connection for each,
it would use up the pool, and look like a Redis that is away.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis.exceptions import NoScriptError, RedisError

from baton.errors import RegistryUnavailable
from baton.rpc.redis_calls import RedisCalls

BATCH = 64  # calls in a round trip: Redis does nothing else meanwhile
FLUSH_S = 1.0  # to send what is left at the end

Reply = list[Any]


@dataclass(frozen=True, slots=True)
class Script:
    """`sha` is Redis's name for it."""

    source: str
    sha: str


@dataclass(frozen=True, slots=True)
class _Call:
    script: Script
    keys: Sequence[str]
    arguments: Sequence[Any]
    reply: asyncio.Future[Reply]


class ScriptCalls:
    """Make it inside the running event loop; calls are sent while `run` runs."""

    def __init__(self, redis: RedisCalls) -> None:
        self._redis = redis
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Call] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def script(self, source: str) -> Script:
        return Script(source, self._redis.client.register_script(source).sha)

    def start(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Any]
    ) -> asyncio.Future[Reply]:
        """What it returns, or RegistryUnavailable, within twice the deadline of a call to Redis."""
        reply: asyncio.Future[Reply] = self._loop.create_future()
        if self._closed:
            reply.set_exception(RegistryUnavailable("calls to Redis have ended"))
            return reply
        self._waiting.append(_Call(script, keys, arguments, reply))
        self._wake.set()
        return reply

    async def run(self) -> None:
        """Until cancelled; then what waits is sent, or fails."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                await self._send_all()
        finally:
            self._closed = True
            try:
                async with asyncio.timeout(FLUSH_S):
                    await self._send_all()
            except TimeoutError:
                pass
            finally:
                while self._waiting:
                    _fail(self._waiting.popleft(), "calls to Redis have ended")

    async def _send_all(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            try:
                replies = await self._redis.call(partial(self._exchange, batch))
            except RegistryUnavailable as error:
                replies = [error] * len(batch)
            except BaseException:
                for call in batch:
                    _fail(call, "calls to Redis have ended")
                raise
            for call, reply in zip(batch, replies, strict=True):
                if isinstance(reply, Exception):
                    _fail(call, str(reply))
                elif not call.reply.done():
                    call.reply.set_result(reply)

    async def _exchange(self, batch: Sequence[_Call]) -> list[Any]:
        replies = await self._send(batch)
        unknown = [place for place, r in enumerate(replies) if isinstance(r, NoScriptError)]
        if unknown:  # Redis has restarted, or never had them
            for source in {batch[place].script.source for place in unknown}:
                await self._redis.client.script_load(source)
            again = await self._send([batch[place] for place in unknown])
            for place, reply in zip(unknown, again, strict=True):
                replies[place] = reply
        if (broken := next((r for r in replies if isinstance(r, RedisError)), None)) is not None:
            raise broken
        return replies

    async def _send(self, batch: Sequence[_Call]) -> list[Any]:
        pipeline = self._redis.client.pipeline(transaction=False)
        for call in batch:
            pipeline.evalsha(call.script.sha, len(call.keys), *call.keys, *call.arguments)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies


def _fail(call: _Call, why: str) -> None:
    if not call.reply.done():
        call.reply.set_exception(RegistryUnavailable(why))
        call.reply.exception()  # who posted it does not look
