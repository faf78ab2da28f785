"""The registry in Redis (6 or newer, also Redis Cluster behind one address, also by TLS).

    baton:{NAME}:conductors              set of incarnations that may be there
    baton:{NAME}:conductor:INCARNATION   ConductorInfo as JSON, with a time to live
    baton:{NAME}:request:KEY             RequestRecord as JSON, with a time to live

The braces are a hash tag: all keys of a cluster lie on one node, so that MGET works. What is lost
with Redis comes back within a third of a lease's time, when conductors announce themselves again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import orjson
import redis.asyncio as redis
from pydantic import TypeAdapter, ValidationError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from baton.errors import ConfigError, RegistryUnavailable
from baton.types.registry import ConductorInfo, RequestRecord

Result = TypeVar("Result")

CALL_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 8
FIRST_PAUSE_S = 0.1  # without a try after a failure, doubled with each further one
LAST_PAUSE_S = 2.0

_CONDUCTOR = TypeAdapter(ConductorInfo)
_REQUEST = TypeAdapter(RequestRecord)

log = logging.getLogger("baton.rpc.registry")


class RedisRegistry:
    """Implements Registry. Make it inside the running event loop.

    While Redis is away, most calls fail at once: one try per pause finds out whether it is back.
    """

    def __init__(self, url: str, cluster: str) -> None:
        self._prefix = f"baton:{{{cluster}}}"
        self._pool = _pool(url)
        self._client = redis.Redis.from_pool(self._pool)
        where = self._pool.connection_kwargs
        self._where = f"{where.get('host', '')}:{where.get('port', '')}"  # without the password
        self._loop = asyncio.get_running_loop()
        self._pause_s = 0.0
        self._pause_until = 0.0

    async def announce(self, info: ConductorInfo, ttl_s: float) -> bool:
        async def act() -> bool:
            async with self._client.pipeline(transaction=True) as together:
                key = self._conductor(info.incarnation)
                together.exists(key)
                together.sadd(self._conductors, info.incarnation)
                together.set(key, orjson.dumps(info), px=_ms(ttl_s))
                known, *_ = await together.execute()
            return bool(known)

        return await self._call(act)

    async def withdraw(self, incarnation: str) -> None:
        async def act() -> None:
            async with self._client.pipeline(transaction=True) as together:
                together.delete(self._conductor(incarnation))
                together.srem(self._conductors, incarnation)
                await together.execute()

        await self._call(act)

    async def conductors(self) -> tuple[ConductorInfo, ...]:
        found = await self._call(self._read_conductors)
        return tuple(sorted(found, key=lambda info: (info.name, info.incarnation)))

    async def note_request(self, key: str, record: RequestRecord, ttl_s: float) -> None:
        body = orjson.dumps(record)
        await self._call(lambda: self._client.set(self._request(key), body, px=_ms(ttl_s)))

    async def find_request(self, key: str) -> RequestRecord | None:
        body = await self._call(lambda: self._client.get(self._request(key)))
        return None if body is None else _parse(_REQUEST, body)

    async def aclose(self) -> None:
        await self._client.aclose()

    @property
    def _conductors(self) -> str:
        return f"{self._prefix}:conductors"

    def _conductor(self, incarnation: str) -> str:
        return f"{self._prefix}:conductor:{incarnation}"

    def _request(self, key: str) -> str:
        return f"{self._prefix}:request:{key}"

    async def _read_conductors(self) -> list[ConductorInfo]:
        names = sorted(str(name) for name in await self._client.smembers(self._conductors))
        if not names:
            return []
        bodies = await self._client.mget([self._conductor(name) for name in names])
        gone = [name for name, body in zip(names, bodies, strict=True) if body is None]
        if gone:  # who is taken out wrongly, by a race, comes back with the next announcement
            await self._client.srem(self._conductors, *gone)
        parsed = (_parse(_CONDUCTOR, body) for body in bodies if body is not None)
        return [info for info in parsed if info is not None]

    async def _call(self, act: Callable[[], Awaitable[Result]]) -> Result:
        if self._loop.time() < self._pause_until:
            raise RegistryUnavailable(f"Redis at {self._where} cannot be reached")
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                result = await act()
        except (RedisError, OSError, TimeoutError) as error:
            raise self._failed(error) from error
        if self._pause_s:
            log.info("Redis at %s is back", self._where)
            self._pause_s = self._pause_until = 0.0
        return result

    def _failed(self, error: Exception) -> RegistryUnavailable:
        why = str(error) or type(error).__name__
        if not self._pause_s:
            log.warning("Redis at %s cannot be used: %s", self._where, why)
        now = self._loop.time()
        if now >= self._pause_until:  # of calls that fail together, the first one counts
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LAST_PAUSE_S)
            self._pause_until = now + self._pause_s
        return RegistryUnavailable(f"Redis at {self._where} cannot be used: {why}")


def _pool(url: str) -> redis.BlockingConnectionPool:
    try:
        return redis.BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=CALL_TIMEOUT_S,  # to wait for a free one
            decode_responses=True,
            socket_connect_timeout=CALL_TIMEOUT_S,
            socket_timeout=CALL_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:  # it does not quote the URL
        raise ConfigError(f"--redis must be redis://host:port or rediss://...: {error}") from None


def _parse(adapter: TypeAdapter[Result], body: bytes | str) -> Result | None:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        log.warning("an entry of another version was left out: %s", error.title)
        return None


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
