"""The registry in Redis (6 or newer, also Redis Cluster behind one address, also by TLS).

    PREFIX:{NAME}:conductors              set of incarnations that may be there
    PREFIX:{NAME}:conductor:INCARNATION   ConductorInfo as JSON, with a time to live
    PREFIX:{NAME}:request:KEY             RequestRecord as JSON, with a time to live

The braces are a hash tag: all keys of a cluster lie on one node, so that MGET works. What is lost
with Redis comes back within a third of a lease's time, when conductors announce themselves again.
docs/redis.md lists all keys of a cluster.
"""

from __future__ import annotations

import logging
from typing import TypeVar

import orjson
from pydantic import TypeAdapter, ValidationError

from baton.rpc.redis_calls import RedisCalls
from baton.rpc.redis_options import RedisOptions
from baton.types.registry import ConductorInfo, RequestRecord

Result = TypeVar("Result")

_CONDUCTOR = TypeAdapter(ConductorInfo)
_REQUEST = TypeAdapter(RequestRecord)

log = logging.getLogger("baton.rpc.registry")


class RedisRegistry:
    """Implements Registry. Make it inside the running event loop. Raises ConfigError."""

    def __init__(self, options: RedisOptions) -> None:
        self._prefix = options.keys
        self._redis = RedisCalls(options)
        self._client = self._redis.client

    async def announce(self, info: ConductorInfo, ttl_s: float) -> bool:
        async def act() -> bool:
            async with self._client.pipeline(transaction=True) as together:
                key = self._conductor(info.incarnation)
                together.exists(key)
                together.sadd(self._conductors, info.incarnation)
                together.set(key, orjson.dumps(info), px=_ms(ttl_s))
                known, *_ = await together.execute()
            return bool(known)

        return await self._redis.call(act)

    async def withdraw(self, incarnation: str) -> None:
        async def act() -> None:
            async with self._client.pipeline(transaction=True) as together:
                together.delete(self._conductor(incarnation))
                together.srem(self._conductors, incarnation)
                await together.execute()

        await self._redis.call(act)

    async def conductors(self) -> tuple[ConductorInfo, ...]:
        found = await self._redis.call(self._read_conductors)
        return tuple(sorted(found, key=lambda info: (info.name, info.incarnation)))

    async def note_request(self, key: str, record: RequestRecord, ttl_s: float) -> None:
        body = orjson.dumps(record)
        await self._redis.call(lambda: self._client.set(self._request(key), body, px=_ms(ttl_s)))

    async def find_request(self, key: str) -> RequestRecord | None:
        body = await self._redis.call(lambda: self._client.get(self._request(key)))
        return None if body is None else _parse(_REQUEST, body)

    async def aclose(self) -> None:
        await self._redis.aclose()

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


def _parse(adapter: TypeAdapter[Result], body: bytes | str) -> Result | None:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        log.warning("an entry of another version was left out: %s", error.title)
        return None


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
