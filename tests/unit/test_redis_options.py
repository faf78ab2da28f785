"""Redis with a password, a user, TLS; every way in which they are wrong says what to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from baton.config import parse_config
from baton.errors import ConfigError, RegistryUnavailable
from baton.rpc.redis_calls import RedisCalls
from baton.rpc.redis_options import RedisOptions
from baton.rpc.registry import Registry, open_registry
from baton.types.registry import ConductorInfo
from baton.worker.cluster_options import ClusterOptions
from tests.certificates import Authority
from tests.redis_server import BINARY, WHY_NOT, RedisServer, redis_server

pytestmark = pytest.mark.skipif(BINARY is None, reason=WHY_NOT)

A = ConductorInfo("a", "life-a", "host-a:80", "host-a:50051")
SECRET = "p@ss word/1"
ACL = (
    "baton on >own-secret ~baton:* resetchannels -@all "
    "+@read +@write +@connection +@transaction +@scripting"
)
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def plain() -> Iterator[RedisServer]:
    with redis_server(SECRET, acl=ACL) as running:
        yield running


@pytest.fixture(scope="module")
def secured(authority: Authority) -> Iterator[RedisServer]:
    with redis_server(SECRET, tls=authority) as running:
        yield running


@pytest.fixture
def over_tls(secured: RedisServer, authority: Authority) -> RedisOptions:
    pair = authority.issue("client")
    return RedisOptions(
        f"rediss://{secured.address}",
        password=SECRET,
        ca_file=str(authority.ca),
        cert_file=str(pair.cert),
        key_file=str(pair.key),
    )


async def try_it(options: RedisOptions) -> None:
    registry = open_registry(options)
    try:
        await registry.announce(A, 60.0)
        assert await registry.conductors() == (A,)
    finally:
        await registry.aclose()


async def failure_of(options: RedisOptions) -> str:
    """What it says; never a secret."""
    with pytest.raises(RegistryUnavailable) as failure:
        await try_it(options)
    for secret in (options.password, SECRET, "own-secret"):
        assert not secret or secret not in failure.value.message
    return failure.value.message


async def test_a_password_that_is_not_in_the_url(plain: RedisServer) -> None:
    await try_it(RedisOptions(f"redis://{plain.address}", password=SECRET))
    assert "invalid username-password" in await failure_of(
        RedisOptions(f"redis://{plain.address}", password="wr0ng")
    )
    assert "authenticated" in await failure_of(RedisOptions(f"redis://{plain.address}"))


async def test_what_is_given_besides_the_url_counts_more(plain: RedisServer) -> None:
    await try_it(
        RedisOptions(f"redis://nobody:no@{plain.address}", username="baton", password="own-secret")
    )
    await try_it(RedisOptions(f"redis://baton:no@{plain.address}", password="own-secret"))


async def test_a_password_in_a_file_may_change(
    plain: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "password"
    file.write_text("wrong\n")
    options = RedisOptions(f"redis://baton@{plain.address}", password_file=str(file))
    await failure_of(options)
    calls = RedisCalls(options)
    file.write_text("own-secret\n")
    assert await calls.call(calls.client.ping)
    file.unlink()
    await calls.client.connection_pool.disconnect()
    with pytest.raises(RegistryUnavailable, match=f"cannot read {file}"):
        await calls.call(calls.client.ping)
    await calls.aclose()
    assert {record.name for record in caplog.records} <= {"baton.rpc.redis"}


async def test_a_user_who_may_only_use_the_prefix(plain: RedisServer) -> None:
    options = RedisOptions(f"redis://{plain.address}", username="baton", password="own-secret")
    await try_it(options)
    assert "no permissions" in await failure_of(replace(options, prefix="other"))


async def test_tls_with_a_certificate_of_our_own(over_tls: RedisOptions) -> None:
    await try_it(over_tls)


async def test_tls_that_is_wrong(over_tls: RedisOptions, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    untrusted = replace(over_tls, ca_file=str(stranger.ca))
    assert "CERTIFICATE_VERIFY_FAILED" in (await failure_of(untrusted)).upper()
    await failure_of(replace(over_tls, cert_file="", key_file=""))
    pair = stranger.issue("client")
    await failure_of(replace(over_tls, cert_file=str(pair.cert), key_file=str(pair.key)))
    elsewhere = over_tls.url.replace("127.0.0.1", "localhost")  # a name that it does not have
    assert (
        "CERTIFICATE_VERIFY_FAILED" in (await failure_of(replace(over_tls, url=elsewhere))).upper()
    )
    plain = RedisOptions(over_tls.url.replace("rediss", "redis"), password=SECRET)
    await failure_of(plain)


async def is_back(registry: Registry) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            await registry.announce(A, 60.0)
            return
        except RegistryUnavailable:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


async def test_it_gets_over_a_restart_with_password_and_tls(authority: Authority) -> None:
    pair = authority.issue("client")
    with redis_server(SECRET, tls=authority) as server:
        options = RedisOptions(
            f"rediss://{server.address}",
            password=SECRET,
            ca_file=str(authority.ca),
            cert_file=str(pair.cert),
            key_file=str(pair.key),
        )
        registry = open_registry(options)
        await registry.announce(A, 60.0)
        server.kill()
        with pytest.raises(RegistryUnavailable):
            await registry.conductors()
        server.start()
        await is_back(registry)
        assert await registry.conductors() == (A,)
        await registry.aclose()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"url": "host:6379"}, "rediss://"),
        ({"url": "http://:s3cret@host"}, "rediss://"),
        ({"ca_file": "ca.crt"}, "rediss://"),
        ({"url": "rediss://h:1", "cert_file": "c"}, "belong together"),
        ({"url": "rediss://h:1", "ca_file": "/missing/ca.crt"}, "/missing/ca.crt"),
        ({"password": "s3cret", "password_file": "f"}, "one of them"),
        ({"password_file": "/missing/password"}, "/missing/password"),
    ],
)
def test_options_that_cannot_work(changed: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as failure:
        RedisOptions(**{"url": "redis://h:1", **changed})
    assert "s3cret" not in failure.value.message


def test_secrets_are_not_shown() -> None:
    assert "s3cret" not in repr(RedisOptions("redis://:s3cret@h:1", password="s3cret"))


def test_options_of_every_process() -> None:
    assert ClusterOptions().redis_options is None
    environ = {"BATON_REDIS": "redis://h:1", "BATON_REDIS_PASSWORD": "s3cret"}
    flags = ["--redis-prefix", "team", "--cluster-name", "blue", "--redis-username", "u"]
    options = parse_config(ClusterOptions, flags, environ, "x").redis_options
    assert options is not None
    assert (options.keys, options.username, options.password) == ("team:{blue}", "u", "s3cret")


async def test_a_call_that_is_cancelled_while_it_is_sent_ends(tmp_path: Path) -> None:
    """The client library sends by `asyncio.wait_for`, which may lose a cancellation."""
    with redis_server() as server:
        calls = RedisCalls(RedisOptions(server.url))

        async def for_ever() -> None:
            while True:
                await calls.call(lambda: calls.client.ping())

        for rounds in range(40):  # whatever it waits for just then
            task = asyncio.create_task(for_ever())
            for _ in range(20 + rounds):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task}, timeout=5)
            assert task.cancelled()
        await calls.aclose()
