"""Every registry behaves alike; the one in Redis also gets over Redis going away."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
import redis.asyncio as redis

from baton.errors import ConfigError, RegistryUnavailable
from baton.rpc import redis_calls
from baton.rpc.memory import Fault, NoFaults
from baton.rpc.redis_options import RedisOptions
from baton.rpc.registry import Registry, open_registry
from baton.rpc.registry_memory import MemoryRegistry, RegistryServer
from baton.types.fleet import Peer
from baton.types.registry import AnswerPlace, ConductorInfo, RequestRecord
from baton.types.request import AttemptId
from tests.redis_server import BINARY, WHY_NOT, RedisServer, redis_server
from tests.virtual_time import virtual_time

needs_redis = pytest.mark.skipif(BINARY is None, reason=WHY_NOT)
A = ConductorInfo("a", "life-a", "host-a:80", "host-a:50051")
B = ConductorInfo("b", "life-b", "host-b:80", "host-b:50051")
PLACE = AnswerPlace(AttemptId("r.0", 2), Peer("decode-0", "life", "w:1"))
RECORD = RequestRecord("life-a", (PLACE,))
PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server("p@ss/word") as running:
        yield running


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Registry, Registry]]:
    """The registries of two processes of one cluster."""
    if request.param == "memory":
        shared = RegistryServer()
        both: list[Registry] = [MemoryRegistry(shared, name) for name in "ab"]
    else:
        running, cluster = request.getfixturevalue("server"), secrets.token_hex(4)
        both = [open_registry(RedisOptions(running.url, cluster)) for _ in "ab"]
    yield both[0], both[1]
    for registry in both:
        await registry.aclose()
        await registry.aclose()


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not await check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_conductors_are_found_until_they_withdraw(pair: tuple[Registry, Registry]) -> None:
    one, other = pair
    assert await other.conductors() == ()
    assert not await one.announce(B, 60.0)
    assert not await one.announce(A, 60.0)
    assert await one.announce(A, 60.0)
    assert await other.conductors() == (A, B)
    await one.withdraw(A.incarnation)
    await one.withdraw("never there")
    assert await other.conductors() == (B,)


async def test_a_conductor_is_forgotten_when_it_falls_silent(
    pair: tuple[Registry, Registry],
) -> None:
    one, other = pair
    await one.announce(A, 60.0)
    await one.announce(B, 0.05)

    async def b_is_gone() -> bool:
        return await other.conductors() == (A,)

    await eventually(b_is_gone)
    assert not await one.announce(B, 60.0)  # it was only slow
    assert await other.conductors() == (A, B)


async def test_a_new_life_is_another_conductor(pair: tuple[Registry, Registry]) -> None:
    one, other = pair
    reborn = ConductorInfo("a", "life-a2", "host-a:81", "host-a:50052")
    await one.announce(A, 60.0)
    await one.announce(reborn, 60.0)
    await one.withdraw(A.incarnation)
    assert await other.conductors() == (reborn,)


async def test_records_of_requests(pair: tuple[Registry, Registry]) -> None:
    one, other = pair
    key = "chatcmpl-1 {with} anything:in it"
    assert await other.find_request(key) is None
    await one.note_request(key, RECORD, 60.0)
    assert await other.find_request(key) == RECORD
    moved = RequestRecord("life-b", (PLACE, PLACE))
    await other.note_request(key, moved, 60.0)
    assert await one.find_request(key) == moved
    await one.note_request(key, RECORD, 0.05)

    async def is_gone() -> bool:
        return await other.find_request(key) is None

    await eventually(is_gone)


@needs_redis
async def test_clusters_that_share_a_redis_do_not_see_each_other(server: RedisServer) -> None:
    one, other = (
        open_registry(RedisOptions(server.url, "x")),
        open_registry(RedisOptions(server.url, "y")),
    )
    await one.announce(A, 60.0)
    await one.note_request("r", RECORD, 60.0)
    assert await other.conductors() == ()
    assert await other.find_request("r") is None
    for registry in (one, other):
        await registry.aclose()


@needs_redis
async def test_every_key_has_a_time_to_live_but_the_index(server: RedisServer) -> None:
    registry = open_registry(RedisOptions(server.url, "ttl"))
    await registry.announce(A, 60.0)
    await registry.note_request("r", RECORD, 60.0)
    client = redis.Redis.from_url(server.url, decode_responses=True)
    keys = [key async for key in client.scan_iter("baton:{ttl}:*")]
    assert sorted(keys) == [
        "baton:{ttl}:conductor:life-a",
        "baton:{ttl}:conductors",
        "baton:{ttl}:request:r",
    ]
    assert [await client.ttl(key) > 0 for key in sorted(keys)] == [True, False, True]
    await client.aclose()
    await registry.aclose()


@needs_redis
async def test_entries_of_another_version_are_left_out(server: RedisServer) -> None:
    registry = open_registry(RedisOptions(server.url, "old"))
    await registry.announce(A, 60.0)
    client = redis.Redis.from_url(server.url)
    await client.sadd("baton:{old}:conductors", "strange")
    await client.set("baton:{old}:conductor:strange", b'{"name": 7}')
    await client.set("baton:{old}:request:r", b"not json")
    assert await registry.conductors() == (A,)
    assert await registry.find_request("r") is None
    await client.aclose()
    await registry.aclose()


@needs_redis
async def test_it_gets_over_a_restart_that_forgot_everything() -> None:
    with redis_server() as server:
        registry = open_registry(RedisOptions(server.url, "c"))
        await registry.announce(A, 60.0)
        server.kill()
        with pytest.raises(RegistryUnavailable) as failure:
            await registry.conductors()
        assert failure.value.retryable
        server.start()

        async def is_back() -> bool:
            try:
                return await registry.conductors() == ()
            except RegistryUnavailable:
                return False

        await eventually(is_back)
        await registry.announce(A, 60.0)
        assert await registry.conductors() == (A,)
        await registry.aclose()


@needs_redis
async def test_a_redis_that_hangs_is_waited_for_once_per_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_calls, "CALL_TIMEOUT_S", 0.1)
    with redis_server() as server:
        registry = open_registry(RedisOptions(server.url, "c"))
        await registry.announce(A, 60.0)
        server.freeze()
        failures = await asyncio.gather(
            *(registry.find_request("r") for _ in range(20)), return_exceptions=True
        )
        assert {type(failure) for failure in failures} == {RegistryUnavailable}
        with pytest.raises(RegistryUnavailable, match="cannot be reached"):  # without a try
            await registry.find_request("r")
        server.thaw()

        async def is_back() -> bool:
            try:
                return await registry.conductors() == (A,)
            except RegistryUnavailable:
                return False

        await eventually(is_back)
        await registry.aclose()


@needs_redis
async def test_a_wrong_password_is_an_error_that_does_not_show_it() -> None:
    with redis_server("right") as server:
        registry = open_registry(RedisOptions(server.url.replace("right", "wr0ng"), "c"))
        with pytest.raises(RegistryUnavailable) as failure:
            await registry.conductors()
        assert "wr0ng" not in failure.value.message
        assert str(server.port) in failure.value.message
        await registry.aclose()


@pytest.mark.parametrize("url", ["host:1", "http://host:1", "redis://:secret@host:port"])
async def test_an_impossible_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as failure:
        open_registry(RedisOptions(url, "c"))
    assert "secret" not in failure.value.message


class LoseSome(NoFaults):
    def on_call(self, caller: str, callee: str, method: str) -> Fault:
        return {
            "find_request": Fault(lose=True),
            "note_request": Fault(lose_answer=True),
            "conductors": Fault(delay_s=2.0),
        }.get(method, Fault())


@virtual_time
async def test_the_one_in_memory_goes_by_its_own_clock() -> None:
    """Processes of the fault harness have clocks that differ."""
    now = 500.0
    server = RegistryServer(lambda: now)
    registry = MemoryRegistry(server, "a")
    await registry.note_request("r", RECORD, 5.0)
    now = 504.9
    assert await registry.find_request("r") == RECORD
    now = 505.0
    assert await registry.find_request("r") is None


@virtual_time
async def test_faults_of_the_one_in_memory() -> None:
    server = RegistryServer()
    registry, other = MemoryRegistry(server, "a", LoseSome()), MemoryRegistry(server, "b")
    for call in (registry.find_request("r"), registry.note_request("r", RECORD, 5.0)):
        with pytest.raises(RegistryUnavailable):
            await call
    assert await other.find_request("r") == RECORD
    with pytest.raises(RegistryUnavailable):
        await registry.conductors()
    assert asyncio.get_running_loop().time() == redis_calls.CALL_TIMEOUT_S
    server.down = True
    with pytest.raises(RegistryUnavailable):
        await other.find_request("r")
    server.down = False
    server.wipe()
    assert await other.find_request("r") is None
