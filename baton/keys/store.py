"""The seam of where keys are kept: a file (`file.py`), or Redis (`redis.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from baton.errors import ConfigError
from baton.keys.key import ApiKey, KeySet
from baton.rpc.redis_options import RedisOptions


class KeyStore(Protocol):
    """Raises ConfigError or RegistryUnavailable."""

    async def read(self) -> KeySet: ...

    async def add(self, key: ApiKey) -> None: ...

    async def replace(self, key_id: str, change: Callable[[ApiKey], ApiKey | None]) -> ApiKey:
        """`change` what is kept of a key; None takes it out. Returns what it was. Raises
        ConfigError when there is no such key."""

    async def aclose(self) -> None: ...


class VersionedKeys(KeyStore, Protocol):
    """Tells cheaply whether something has changed."""

    async def version(self) -> int:
        """A number that grows with every change."""

    async def read_with_version(self) -> tuple[int, KeySet]:
        """All keys, and the number that they had."""


def open_redis_keys(options: RedisOptions) -> VersionedKeys:
    """Make it inside the running event loop; it connects when it is first used. Raises ConfigError
    for options that cannot work, and when the client library is missing."""
    try:
        from baton.keys.redis import RedisKeys
    except ImportError as error:
        raise ConfigError(f"--redis needs its client library: baton-llm[redis] ({error})") from None
    return RedisKeys(options)
