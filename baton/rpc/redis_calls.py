"""Calls to Redis that give up soon, and leave it alone for a while when it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import AuthenticationError, RedisError

from baton.errors import ConfigError, RegistryUnavailable
from baton.rpc.redis_options import RedisOptions

Result = TypeVar("Result")

CALL_TIMEOUT_S = 1.0
MAX_CONNECTIONS = 8
FIRST_PAUSE_S = 0.1  # without a try after a failure, doubled with each further one
LAST_PAUSE_S = 2.0

log = logging.getLogger("baton.rpc.redis")


class RedisCalls:
    """One client and what is known of its Redis. Make it inside the running event loop.

    While Redis is away, most calls fail at once: one try per pause finds out whether it is back.
    """

    def __init__(self, options: RedisOptions) -> None:
        self.client = connect(options)
        self.address = address_of(self.client)
        self._loop = asyncio.get_running_loop()
        self._pause_s = 0.0
        self._pause_until = 0.0

    async def call(self, act: Callable[[], Awaitable[Result]]) -> Result:
        """What `act` returns. It uses `client`. Raises RegistryUnavailable, and nothing else of
        Redis."""
        if self._loop.time() < self._pause_until:
            raise RegistryUnavailable(f"Redis at {self.address} cannot be reached")
        task = asyncio.current_task()
        cancels = task.cancelling() if task is not None else 0
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                result = await act()
            if task is not None and task.cancelling() > cancels:
                # Before Python 3.12, wait_for, by which the client library sends, loses one that
                # comes while the bytes go: who called would never end.
                raise asyncio.CancelledError
        except (RedisError, OSError, TimeoutError) as error:
            raise self._failed(error) from error
        if self._pause_s:
            log.info("Redis at %s is back", self.address)
            self._pause_s = self._pause_until = 0.0
        return result

    async def aclose(self) -> None:
        await self.client.aclose()

    def _failed(self, error: Exception) -> RegistryUnavailable:
        why = str(error) or type(error).__name__
        if not self._pause_s:
            log.warning("Redis at %s cannot be used: %s", self.address, why)
        now = self._loop.time()
        if now >= self._pause_until:  # of calls that fail together, the first one counts
            self._pause_s = min(max(2 * self._pause_s, FIRST_PAUSE_S), LAST_PAUSE_S)
            self._pause_until = now + self._pause_s
        return RegistryUnavailable(f"Redis at {self.address} cannot be used: {why}")


def connect(options: RedisOptions, max_connections: int = MAX_CONNECTIONS) -> redis.Redis:
    """A client that connects when it is first used. Every wait in it has a deadline; it does not
    try again by itself. Close it by `aclose`. Raises ConfigError."""
    given = {
        "ssl_ca_certs": options.ca_file,
        "ssl_certfile": options.cert_file,
        "ssl_keyfile": options.key_file,
    }
    try:
        pool = redis.BlockingConnectionPool.from_url(
            options.url,
            max_connections=max_connections,
            timeout=CALL_TIMEOUT_S,  # to wait for a free one
            decode_responses=True,
            socket_connect_timeout=CALL_TIMEOUT_S,
            socket_timeout=CALL_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            **{name: path for name, path in given.items() if path},
        )
    except ValueError as error:  # it does not quote the URL
        raise ConfigError(f"--redis must be redis://host:port or rediss://...: {error}") from None
    _log_in(pool, options)
    return redis.Redis.from_pool(pool)


def address_of(client: redis.Redis) -> str:
    """host:port, or the path of a socket. Without the password."""
    where = client.connection_pool.connection_kwargs
    return str(where.get("path") or f"{where.get('host', '')}:{where.get('port', '')}")


def _log_in(pool: redis.ConnectionPool, options: RedisOptions) -> None:
    """What is given besides the URL counts more than what is in it."""
    where = pool.connection_kwargs
    in_url = [where.pop("username", None), where.pop("password", None)]
    name, password = options.username or in_url[0], options.password or in_url[1]
    if options.password_file:
        where["credential_provider"] = _PasswordFile(name or "", Path(options.password_file))
        return
    where.update(username=name, password=password)


class _PasswordFile(CredentialProvider):
    """Reads it at every connection."""

    def __init__(self, username: str, path: Path) -> None:
        self._username = username
        self._path = path

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        try:
            password = self._path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text"
            raise AuthenticationError(f"cannot read {self._path}: {why}") from None
        return (self._username, password) if self._username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()  # a small file, once per connection
