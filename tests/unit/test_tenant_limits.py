"""Limits in memory and in Redis behave alike; those in Redis are shared, and outlive neither their
conductors nor Redis's outages for long."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.errors import InvalidRequest, RateLimited
from baton.rpc.redis_options import RedisOptions
from conductor.tenants.limits import Claim, Grant, LimitReached, Limits
from conductor.tenants.limits_memory import MemoryLimits
from conductor.tenants.limits_redis import LEASE_S, LimitsUnavailable, RedisLimits
from conductor.tenants.tenant import Amounts, Kind, Tenant, TenantLimits
from tests.redis_server import BINARY, WHY_NOT, RedisServer, redis_server
from tests.virtual_time import run_virtual

needs_redis = pytest.mark.skipif(BINARY is None, reason=WHY_NOT)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def tenant(name: str = "t", **limits: Any) -> Tenant:
    return Tenant(name, limits=TenantLimits(**limits))


def claim(key: str, input_tokens: int = 10, output_tokens: int = 20) -> Claim:
    return Claim(key, Amounts(1, input_tokens, output_tokens))


def used(limits: Limits, who: Tenant) -> tuple[int, ...]:
    standing = limits.standing(who)
    assert standing is not None
    return standing.used


class Kept:
    """A kind of limits, with a clock that stands still until it is moved."""

    def __init__(self, limits: Limits, clock: Clock, settled: Callable[[], Any]) -> None:
        self.limits = limits
        self.clock = clock
        self._settled = settled

    async def reserve(self, who: Tenant, what: Claim) -> Grant:
        return await self.limits.reserve(who, what)

    async def settle(self, grant: Grant, spent: Amounts) -> None:
        self.limits.settle(grant, spent)
        await self._settled()

    async def refused(self, who: Tenant, what: Claim) -> LimitReached:
        with pytest.raises(LimitReached) as error:
            await self.limits.reserve(who, what)
        return error.value


@asynccontextmanager
async def running(limits: RedisLimits) -> AsyncIterator[RedisLimits]:
    task = asyncio.create_task(limits.run())
    try:
        yield limits
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await limits.aclose()


async def sent(limits: RedisLimits) -> None:
    """Redis has answered everything that was asked before."""
    await limits._calls.start(limits._scripts[2], ["{x}:a", "{x}:b"], [0, 1])


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server("p@ss") as running:
        yield running


@pytest.fixture(params=["memory", pytest.param("redis", marks=needs_redis)])
async def kept(request: pytest.FixtureRequest) -> AsyncIterator[Kept]:
    clock = Clock()
    if request.param == "memory":

        async def nothing() -> None:
            return

        yield Kept(MemoryLimits(clock), clock, nothing)
        return
    options = RedisOptions(request.getfixturevalue("server").url, cluster=secrets.token_hex(4))
    async with running(RedisLimits(options, None, clock=clock)) as limits:
        yield Kept(limits, clock, lambda: sent(limits))


async def test_a_minute_lets_as_much_through_as_is_allowed(kept: Kept) -> None:
    who = tenant(input_tokens_per_minute=100)
    for number in range(10):
        await kept.reserve(who, claim(f"r{number}"))
        kept.clock.now += 1
    refused = await kept.refused(who, claim("too-much", 15))
    assert refused.reason == "input-tokens"
    assert refused.retry_after_s == pytest.approx(61.25 - 10)
    assert "limit: 100 a minute, used or reserved: 100, this request: 15" in refused.message
    kept.clock.now += refused.retry_after_s - 0.001
    await kept.refused(who, claim("too-early", 15))
    kept.clock.now += 0.001
    await kept.reserve(who, claim("in-time", 15))
    assert used(kept.limits, who) == (9, 95, 180)


async def test_the_kind_that_is_free_last_is_the_reason(kept: Kept) -> None:
    who = tenant(requests_per_minute=2, output_tokens_per_minute=100)
    await kept.reserve(who, claim("a", 1, 30))
    kept.clock.now += 5
    await kept.reserve(who, claim("b", 1, 50))
    kept.clock.now += 5
    assert (await kept.refused(who, claim("c", 1, 10))).reason == Kind.REQUESTS.label
    assert (await kept.refused(who, claim("d", 1, 60))).reason == Kind.OUTPUT.label


async def test_what_is_not_spent_comes_back_at_once(kept: Kept) -> None:
    who = tenant(output_tokens_per_minute=100)
    grant = await kept.reserve(who, claim("a", 10, 90))
    kept.clock.now += 30
    await kept.refused(who, claim("b", 10, 30))
    await kept.settle(grant, Amounts(1, 10, 5))
    assert used(kept.limits, who) == (1, 10, 5)
    await kept.reserve(who, claim("b", 10, 95))
    kept.clock.now += 30.25
    await kept.refused(who, claim("c", 10, 6))
    await kept.reserve(who, claim("c", 10, 5))


async def test_a_request_that_ends_after_its_window_changes_nothing(kept: Kept) -> None:
    who = tenant(output_tokens_per_minute=100)
    grant = await kept.reserve(who, claim("a", 10, 90))
    kept.clock.now += 61
    other = await kept.reserve(who, claim("b", 10, 80))
    await kept.settle(grant, Amounts(1, 10, 5))
    assert used(kept.limits, who) == (1, 10, 80)
    await kept.settle(other, Amounts())
    assert used(kept.limits, who) == (0, 0, 0)


async def test_what_was_longer_than_the_bucket_is_taken_at_the_end(kept: Kept) -> None:
    who = tenant(output_tokens_per_minute=100)
    grant = await kept.reserve(who, claim("a", 1, 5_000))
    assert grant.reserved.output_tokens == 100
    kept.clock.now += 10
    await kept.settle(grant, Amounts(1, 1, 140))
    kept.clock.now += 50.25  # the reserved ones are back
    assert (await kept.refused(who, claim("b", 1, 61))).retry_after_s == pytest.approx(10)
    await kept.reserve(who, claim("b", 1, 60))


async def test_a_prompt_that_never_fits_is_no_reason_to_wait(kept: Kept) -> None:
    with pytest.raises(InvalidRequest) as error:
        await kept.reserve(tenant(input_tokens_per_minute=9), claim("a"))
    assert error.value.code == "prompt_exceeds_limit"


async def test_a_shorter_window_lets_less_through_at_once(kept: Kept) -> None:
    who = tenant(input_tokens_per_minute=600, window_s=6.0)
    for minute_part in range(10):
        for number in range(6):
            await kept.reserve(who, claim(f"r{minute_part}-{number}"))
        refused = await kept.refused(who, claim("more"))
        assert refused.retry_after_s == pytest.approx(6.0125, abs=0.0126)
        kept.clock.now += refused.retry_after_s + 0.001  # of which the clock loses a part


async def test_requests_at_once(kept: Kept) -> None:
    who = tenant(concurrent_requests=2)
    first = await kept.reserve(who, claim("a"))
    await kept.reserve(who, claim("b"))
    refused = await kept.refused(who, claim("c"))
    assert (refused.reason, refused.code) == ("concurrent", "rate_limit_exceeded")
    await kept.settle(first, Amounts())
    await kept.reserve(who, claim("c"))
    standing = kept.limits.standing(who)
    assert standing is not None
    assert standing.running == 2


async def test_who_comes_back_takes_the_place_of_the_first_connection(kept: Kept) -> None:
    who = tenant(concurrent_requests=1)
    first = await kept.reserve(who, claim("a"))
    second = await kept.reserve(who, claim("a"))
    await kept.settle(first, Amounts())  # its end is not that of the second
    await kept.refused(who, claim("b"))
    await kept.settle(second, Amounts())
    await kept.reserve(who, claim("b"))


async def test_tenants_are_apart(kept: Kept) -> None:
    one, other = tenant("one", requests_per_minute=1), tenant("other", requests_per_minute=1)
    await kept.reserve(one, claim("a"))
    await kept.refused(one, claim("b"))
    await kept.reserve(other, claim("b"))


async def test_changed_limits_count_at_once(kept: Kept) -> None:
    await kept.reserve(tenant(input_tokens_per_minute=20), claim("a"))
    await kept.refused(tenant(input_tokens_per_minute=15), claim("b"))
    await kept.reserve(tenant(input_tokens_per_minute=30), claim("b"))
    assert used(kept.limits, tenant()) == (2, 20, 40)


async def test_a_long_silence_is_forgotten(kept: Kept) -> None:
    who = tenant(input_tokens_per_minute=10)
    await kept.reserve(who, claim("a"))
    kept.clock.now += 100_000
    await kept.reserve(who, claim("b"))
    assert used(kept.limits, who) == (1, 10, 20)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_nothing_is_lost_and_nothing_is_too_much(data: st.DataObject) -> None:
    """Of any order of requests and ends: never more than the limit in a window of what was granted
    and stands; when all have ended and a window has passed, everything is free."""

    async def go() -> None:
        clock = Clock()
        limits = MemoryLimits(clock)
        who = tenant(output_tokens_per_minute=1000, concurrent_requests=4, requests_per_minute=40)
        running: list[tuple[int, Grant]] = []
        stands: list[tuple[float, int]] = []
        waits: list[float] = []
        for step in range(data.draw(st.integers(1, 40))):
            clock.now += data.draw(st.sampled_from([0, 0, 0.1, 1, 7.7, 31]))
            if running and data.draw(st.booleans()):
                index, grant = running.pop(data.draw(st.integers(0, len(running) - 1)))
                spent = data.draw(st.integers(0, grant.reserved.output_tokens))
                limits.settle(grant, Amounts(1, 0, spent))
                stands[index] = stands[index][0], spent
                continue
            wanted = data.draw(st.integers(1, 1500))
            try:
                grant = await limits.reserve(who, Claim(f"r{step}", Amounts(1, 0, wanted)))
            except RateLimited as error:
                waits.append(error.retry_after_s)
                continue
            running.append((len(stands), grant))
            stands.append((clock.now, grant.reserved.output_tokens))
            assert len(running) <= 4
            since = [t for t, _ in stands if t > clock.now - 60]
            assert len(since) <= 40
            assert sum(tokens for t, tokens in stands if t > clock.now - 60) <= 1000
        for _, grant in running:
            limits.settle(grant, Amounts())
        assert all(wait_s > 0 for wait_s in waits)
        clock.now += 60.25
        standing = limits.standing(who)
        if stands:
            assert standing is not None
            assert (standing.used, standing.running) == ((0, 0, 0), 0)

    asyncio.run(go())


def test_limits_follow_the_loops_time_without_a_clock() -> None:
    async def go() -> None:
        limits, who = MemoryLimits(), tenant(requests_per_minute=1)
        await limits.reserve(who, claim("a"))
        with pytest.raises(RateLimited) as refused:
            await limits.reserve(who, claim("b"))
        await asyncio.sleep(refused.value.retry_after_s)
        await limits.reserve(who, claim("b"))

    run_virtual(go())


async def test_a_share_of_the_limits() -> None:
    limits = MemoryLimits(Clock(), share=lambda: 1 / 3)
    who = tenant(requests_per_minute=7, concurrent_requests=1)
    first = await limits.reserve(who, claim("a"))
    limits.settle(first, Amounts(1))
    limits.settle(await limits.reserve(who, claim("b")), Amounts(1))
    with pytest.raises(RateLimited):
        await limits.reserve(who, claim("c"))


# -- only in Redis ---------------------------------------------------------------------------------


@pytest.fixture
def options(server: RedisServer) -> RedisOptions:
    return RedisOptions(server.url, cluster=secrets.token_hex(4))


@needs_redis
async def test_two_conductors_share_one_limit(options: RedisOptions) -> None:
    who = tenant(requests_per_minute=50, concurrent_requests=1000)
    async with (
        running(RedisLimits(options, None)) as one,
        running(RedisLimits(options, None)) as two,
    ):
        results = await asyncio.gather(
            *(limits.reserve(who, claim(f"{n}")) for n in range(50) for limits in (one, two)),
            return_exceptions=True,
        )
    others = {type(result) for result in results} - {Grant, LimitReached}
    assert not others
    assert sum(isinstance(result, Grant) for result in results) == 50


@needs_redis
async def test_what_a_killed_conductor_had_reserved_comes_back(options: RedisOptions) -> None:
    clock = Clock()
    who = tenant(concurrent_requests=2, output_tokens_per_minute=100)
    async with running(RedisLimits(options, None, clock=clock)) as alive:
        async with running(RedisLimits(options, None, clock=clock)) as killed:
            await killed.reserve(who, claim("a", 1, 50))  # it says nothing more
        mine = await alive.reserve(who, claim("b", 1, 50))
        for _ in range(3):
            clock.now += LEASE_S / 4
            await alive.renew()
            with pytest.raises(LimitReached, match="are running"):
                await alive.reserve(who, claim("c", 1, 0))
        clock.now += LEASE_S / 4
        await alive.reserve(who, claim("c", 1, 0))  # the place is free, and ours has stayed
        with pytest.raises(LimitReached, match="are running"):
            await alive.reserve(who, claim("d", 1, 0))
        alive.settle(mine, Amounts(1, 1, 50))
        with pytest.raises(LimitReached, match="output tokens"):
            await alive.reserve(who, claim("d", 1, 1))
        clock.now += 60
        await alive.renew()
        await alive.reserve(who, claim("d", 1, 100))


@needs_redis
async def test_keys_in_redis_end_by_themselves(options: RedisOptions) -> None:
    who = tenant(requests_per_minute=5, concurrent_requests=5)
    async with running(RedisLimits(options, None)) as limits:
        await limits.reserve(who, claim("a"))
        client = limits._redis.client
        names = [name async for name in client.scan_iter(f"{options.keys}:*")]
        assert len(names) == 3
        assert all([0 < await client.pttl(name) <= 120_000 for name in names])


@needs_redis
async def test_what_is_settled_last_is_sent_before_the_end(options: RedisOptions) -> None:
    who = tenant(requests_per_minute=5000)
    async with running(RedisLimits(options, None)) as limits:
        grants = await asyncio.gather(*(limits.reserve(who, claim(f"{n}")) for n in range(150)))
        for grant in grants:
            limits.settle(grant, Amounts())
    assert used(limits, who) == (0, 0, 0)
    with pytest.raises(LimitsUnavailable):
        await limits.reserve(who, claim("late"))


@needs_redis
async def test_what_was_granted_to_a_client_that_has_gone_goes_back(
    options: RedisOptions,
) -> None:
    who = tenant(concurrent_requests=1, output_tokens_per_minute=100)
    async with running(RedisLimits(options, None)) as limits:
        await sent(limits)  # connected
        reserving = asyncio.create_task(limits.reserve(who, claim("a", 1, 100)))
        await asyncio.sleep(0)
        reserving.cancel()
        await asyncio.gather(reserving, return_exceptions=True)
        assert reserving.cancelled()
        await sent(limits)
        await limits.reserve(who, claim("b", 1, 100))


@needs_redis
async def test_redis_forgets_the_scripts(options: RedisOptions) -> None:
    who = tenant(requests_per_minute=5)
    async with running(RedisLimits(options, None)) as limits:
        await limits.reserve(who, claim("a"))
        await limits._redis.client.script_flush()
        await limits.reserve(who, claim("b"))
        assert used(limits, who) == (2, 20, 40)


@needs_redis
async def test_while_redis_is_away() -> None:
    told: list[str] = []
    who = tenant(requests_per_minute=1000)
    with redis_server() as server:
        options = RedisOptions(server.url)
        local = MemoryLimits(share=lambda: 0.005)
        async with (
            running(RedisLimits(options, local, lambda: told.append("x"))) as limits,
            running(RedisLimits(options, None)) as strict,
        ):
            early = await limits.reserve(who, claim("early"))
            server.kill()
            grants = [await limits.reserve(who, claim(f"{n}")) for n in range(5)]
            with pytest.raises(RateLimited):
                await limits.reserve(who, claim("more"))
            assert not any(grant.shared for grant in grants)
            assert len(told) == 6
            assert used(limits, who)[0] == 5
            with pytest.raises(LimitsUnavailable):
                await strict.reserve(who, claim("a"))
            limits.settle(early, Amounts())
            for grant in grants:
                limits.settle(grant, Amounts())
            server.start()
            async with asyncio.timeout(20):
                while True:  # it is left alone for a while after a failure
                    grant = await limits.reserve(who, claim("back"))
                    limits.settle(grant, Amounts())
                    if grant.shared:
                        break
                    await asyncio.sleep(0.05)
