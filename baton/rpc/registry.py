"""The registry seam: the little that several conductors share, each entry with a time to live.

`registry_redis` keeps it in Redis, `registry_memory` in one process, for tests. Nothing here is
needed to go on serving: who uses a registry keeps what it knows while that cannot be reached.
"""

from __future__ import annotations

from typing import Protocol

from baton.errors import ConfigError
from baton.rpc.redis_options import RedisOptions
from baton.types.registry import ConductorInfo, RequestRecord


class Registry(Protocol):
    """Every call has a deadline and raises RegistryUnavailable, and nothing else, when it fails."""

    async def announce(self, info: ConductorInfo, ttl_s: float) -> bool:
        """Say, or say again, that the conductor is there, for `ttl_s` seconds from now. Returns
        whether the registry knew that already."""

    async def withdraw(self, incarnation: str) -> None:
        """The conductor goes. Harmless when it is unknown."""

    async def conductors(self) -> tuple[ConductorInfo, ...]:
        """All whose time has not run out, by name."""

    async def note_request(self, key: str, record: RequestRecord, ttl_s: float) -> None:
        """Keep `record` under `key`, instead of what was there, for `ttl_s` seconds from now."""

    async def find_request(self, key: str) -> RequestRecord | None: ...

    async def aclose(self) -> None:
        """Close connections. Safe to call twice."""


def open_registry(options: RedisOptions) -> Registry:
    """The registry in Redis. Connects when it is first used.

    Raises ConfigError for options that cannot work, and when the client library is missing.
    """
    try:  # only who asks for Redis needs its library
        from baton.rpc.registry_redis import RedisRegistry
    except ImportError as error:
        raise ConfigError(f"--redis needs its client library: baton-llm[redis] ({error})") from None
    return RedisRegistry(options)
