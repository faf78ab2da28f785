"""Asks the Redis of a cluster what the processes will ask it for."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from redis.exceptions import NoPermissionError, RedisError

from baton.errors import RegistryUnavailable
from baton.rpc.redis_calls import address_of, connect
from baton.rpc.redis_options import RedisOptions

_NAMES = {"url": "BATON_REDIS", "cluster": "BATON_CLUSTER_NAME"}  # the others: BATON_REDIS_FIELD
_PINGS = 5
_DEADLINE_S = 5.0


def options_of(environ: Mapping[str, str]) -> RedisOptions:
    """As the processes have them. Raises ConfigError."""
    names = {
        field.name: _NAMES.get(field.name, f"BATON_REDIS_{field.name.upper()}")
        for field in dataclasses.fields(RedisOptions)
    }
    return RedisOptions(**{key: environ[name] for key, name in names.items() if name in environ})


async def ask(environ: Mapping[str, str]) -> dict[str, object]:
    """Raises BatonError when it cannot be used."""
    options = options_of(environ)
    client = connect(options)
    address = address_of(client)
    try:
        async with asyncio.timeout(_DEADLINE_S):
            return {"address": address, **await _ask(client, options)}
    except (RedisError, OSError, TimeoutError) as error:
        why = str(error) or type(error).__name__
        raise RegistryUnavailable(f"Redis at {address} cannot be used: {why}") from error
    finally:
        await client.aclose()


async def _ask(client: Any, options: RedisOptions) -> dict[str, object]:
    key = f"{options.keys}:doctor"
    await client.set(key, "1", px=1000)  # an ACL may allow to connect only
    await client.get(key)
    pings = [await _timed_ping(client) for _ in range(_PINGS)]
    return {"ping_s": min(pings), "offset_s": await _offset(client)}


async def _timed_ping(client: Any) -> float:
    begin = time.perf_counter()
    await client.ping()
    return time.perf_counter() - begin


async def _offset(client: Any) -> float | None:
    """Our clock minus Redis's, in seconds; None: its user may not ask."""
    begin = time.time()
    try:
        seconds, micros = await client.time()
    except NoPermissionError:
        return None
    return (begin + time.time()) / 2 - (int(seconds) + int(micros) / 1e6)
