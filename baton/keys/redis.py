"""Keys in Redis, for all conductors of a cluster:

    PREFIX:{NAME}:keys            hash: the SHA-256 of a key -> TENANT SHA256 EXPIRES
    PREFIX:{NAME}:keys:version    number that grows with every change

Conductors ask for the number, and for the keys when it has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.errors import ConfigError
from baton.keys.key import ApiKey, KeySet, parse_key
from baton.rpc.redis_calls import RedisCalls
from baton.rpc.redis_options import RedisOptions

log = logging.getLogger("baton.keys")


class RedisKeys:
    """Implements VersionedKeys. Make it inside the running event loop. Every call has a deadline,
    and raises RegistryUnavailable when it fails."""

    def __init__(self, options: RedisOptions) -> None:
        self._redis = RedisCalls(options)
        self._client = self._redis.client
        self._hash = f"{options.keys}:keys"
        self._version = f"{options.keys}:keys:version"

    async def version(self) -> int:
        """A number that grows with every change."""

        async def act() -> int:
            return int(await self._client.get(self._version) or 0)

        return await self._redis.call(act)

    async def read(self) -> KeySet:
        return (await self.read_with_version())[1]

    async def read_with_version(self) -> tuple[int, KeySet]:
        """All keys, and the number that they had. What is no key is left out."""

        async def act() -> tuple[object, dict[str, str]]:
            async with self._client.pipeline(transaction=True) as together:
                together.get(self._version)
                together.hgetall(self._hash)
                number, found = await together.execute()
            return number, found

        number, found = await self._redis.call(act)
        keys = [key for key in map(_parse, found.values()) if key is not None]
        return int(str(number or 0)), KeySet(keys)

    async def add(self, key: ApiKey) -> None:
        async def act() -> None:
            async with self._client.pipeline(transaction=True) as together:
                together.hset(self._hash, key.digest, str(key))
                together.incr(self._version)
                await together.execute()

        await self._redis.call(act)

    async def replace(self, key_id: str, change: Callable[[ApiKey], ApiKey | None]) -> ApiKey:
        """`change` what is kept of a key; None takes it out. Returns what it was. Raises
        ConfigError when there is no such key."""
        known = await self.read()
        found = next((key for key in known.keys if key.id == key_id), None)
        if found is None:
            raise ConfigError(f"there is no key {key_id!r}: see `baton keys list`")
        changed = change(found)
        if changed is not None:
            await self.add(changed)
            return found

        async def act() -> None:
            async with self._client.pipeline(transaction=True) as together:
                together.hdel(self._hash, found.digest)
                together.incr(self._version)
                await together.execute()

        await self._redis.call(act)
        return found

    async def aclose(self) -> None:
        await self._redis.aclose()


def _parse(text: str) -> ApiKey | None:
    try:
        return parse_key(text)
    except ConfigError as error:
        log.warning("a key in Redis was left out: %s", error.message)
        return None
