"""Two conductors and their Redis: one set of keys, one account for each tenant."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.keys.key import ApiKey, digest_of
from baton.keys.store import open_redis_keys
from baton.rpc.redis_options import RedisOptions
from tests.redis_server import BINARY, WHY_NOT, RedisServer, redis_server
from tests.tenants_kit import Files, ask, client_of, key_of, until_status

pytestmark = pytest.mark.skipif(BINARY is None, reason=WHY_NOT)


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


async def test_limits_and_keys_are_shared(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.tenants.directory.POLL_S", 0.02)
    cluster = secrets.token_hex(4)
    files = Files(tmp_path)
    files.write_tenants(
        {"name": "a", "limits": {"requests_per_minute": 5, "output_tokens_per_minute": 1000}}
    )
    keys = open_redis_keys(RedisOptions(server.url, cluster))
    first, second = (ApiKey("a", digest_of(key_of("a", number))) for number in (0, 1))
    await keys.add(first)
    shared = {"keys": "redis", "redis": server.url, "cluster_name": cluster}
    async with files.server(**shared) as one, files.server(**shared) as two:
        answers = await asyncio.gather(
            *(ask(each, key_of("a")) for _ in range(4) for each in (one, two))
        )
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * 5 + [429] * 3

        await keys.add(second)
        for each in (one, two):
            await until_status(each, key_of("a", 1), 200)
        await keys.replace(first.id, lambda key: replace(key, expires_s=1.0))
        for each in (one, two):
            await until_status(each, key_of("a"), 401)
        async with client_of(one, key_of("a", 1)) as client:
            standing = (await client.get("/v1/models")).headers
        assert standing["x-ratelimit-remaining-requests"] == "0"
    await keys.aclose()


async def test_keys_are_known_while_redis_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("conductor.tenants.directory.POLL_S", 0.02)
    files = Files(tmp_path)
    files.write_tenants({"name": "a"}, {"name": "b", "limits": {"concurrent_requests": 3}})
    with redis_server() as server:
        await add_keys(server.url)
        config = {"keys": "redis", "redis": server.url, "limits_without_redis": "refuse"}
        async with files.server(**config) as cluster:
            assert (await ask(cluster, key_of("b"))).status_code == 200
            server.kill()
            assert (await ask(cluster, key_of("a"))).status_code == 200
            refused = await ask(cluster, key_of("b"))
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "limits_unavailable"
        async with files.server(**config) as cluster:  # one that has never seen a key
            unknown = await ask(cluster, key_of("a"))
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "keys_unknown")
            server.start()
            await add_keys(server.url)
            await until_status(cluster, key_of("a"), 200)


async def add_keys(url: str) -> None:
    """As the command does it: by connections of its own."""
    keys = open_redis_keys(RedisOptions(url))
    for name in "ab":
        await keys.add(ApiKey(name, digest_of(key_of(name))))
    await keys.aclose()
