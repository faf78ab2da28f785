"""What keys and limits cost a request, and how exact limits are: a part of `baton bench router`.

Exactness is measured on a clock that is set by hand: every tenant asks for more than twice what it
may, its requests end after a while with half of what they had reserved, and what they used in a
minute is compared with the limit. What a request waits is measured by the real clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import random
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from baton.errors import NoWorker, RateLimited
from baton.keys.key import ApiKey, KeySet, digest_of, new_key
from baton.rpc.redis_options import RedisOptions
from conductor.bench_figures import Figure, Plan, latencies
from conductor.tenants.directory import Directory
from conductor.tenants.limits import Claim, Grant, Limits
from conductor.tenants.limits_memory import MemoryLimits
from conductor.tenants.limits_redis import RedisLimits
from conductor.tenants.tenant import Amounts, Kind, Tenant, TenantLimits

KEYS = 1000
TENANTS = 100
MINUTES = 2
REDIS_MINUTES = 1
# By the minute. A third of the tenants has each.
LIMITS = (
    TenantLimits(requests_per_minute=100),
    TenantLimits(input_tokens_per_minute=60_000),
    TenantLimits(output_tokens_per_minute=60_000),
)
PROMPT = (100, 1000)  # tokens
ANSWER = (100, 1000)  # tokens that are asked for; half as many come
OVERLOAD = 2.5  # times its limit that a tenant asks for
TICK_S = 0.25
PATIENCE_S = 1.0  # of a client that was refused: then it asks again, told to wait or not
LAST_S = 3.0  # a request's, at most
CALLS = 5000  # that are timed
REDIS_CALLS = 320
AT_ONCE = 64
READY_S = 10.0  # until Redis answers
BREATH_S = 0.2  # after it took too long
PART = "tenants"

Value = TypeVar("Value")


def measure_tenants(plan: Plan) -> Iterator[Figure]:
    yield from asyncio.run(_measure(plan.seed))


async def _measure(seed: int) -> list[Figure]:
    keys, directory = await _make_directory()
    figures = await _costs("memory", keys, directory, MemoryLimits(), CALLS)
    clock = _Clock()
    figures += await _exactness("memory", clock, MemoryLimits(clock), seed, MINUTES)
    async with _own_redis() as url:
        if url is None:
            return figures
        async with _running(RedisLimits(RedisOptions(url, cluster="costs"), None)) as shared:
            for at_once in (1, AT_ONCE):
                where = f"Redis, {at_once} at once"
                figures += await _costs(where, keys, directory, shared, REDIS_CALLS, at_once)
        clock = _Clock()
        options = RedisOptions(url, cluster="exactness")
        async with _running(RedisLimits(options, None, clock=clock)) as shared:
            figures += await _exactness("Redis", clock, shared, seed, REDIS_MINUTES)
    return figures


# -- what it costs ---------------------------------------------------------------------------------


async def _costs(
    where: str,
    keys: list[str],
    directory: Directory,
    limits: Limits,
    calls: int,
    at_once: int = 1,
) -> list[Figure]:
    """From the header to the grant, without tokenizing, which is not for this."""
    samples: list[float] = []
    numbers = itertools.count()
    headers = itertools.cycle(f"Bearer {key}" for key in keys)

    async def ask() -> None:
        for _ in range(max(1, calls // at_once)):
            claim = Claim(f"request-{next(numbers)}", Amounts(1, 100, 100))
            began = time.perf_counter()
            tenant = _unbounded(directory.find(next(headers)))
            try:
                grant = await limits.reserve(tenant, claim)
            except NoWorker:
                await asyncio.sleep(BREATH_S)
                continue
            samples.append(time.perf_counter() - began)
            limits.settle(grant, Amounts(1, 100, 50))

    with contextlib.suppress(NoWorker):
        await limits.reserve(_unbounded(directory.tenants[0]), Claim("warm-up", Amounts()))
    await asyncio.gather(*(ask() for _ in range(at_once)))
    target = "< 100 µs" if at_once == 1 and where == "memory" else ""
    return list(latencies(PART, f"key and limits, {where}", sorted(samples), target))


def _unbounded(tenant: Tenant) -> Tenant:
    """With every kind of limit, and room for all calls."""
    return Tenant(tenant.name, limits=_ROOM)


_ROOM = TenantLimits(10**9, 10**9, 10**9, 10**6)


# -- how exact it is -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Clock:
    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class _Load:
    """What one tenant asks for, and what came of it. `running`: when each request ends."""

    tenant: Tenant
    kind: Kind
    limit: int
    owed: float = 0.0  # of its kind, not asked for yet
    patient_until: float = 0.0  # it was refused
    running: list[tuple[float, int, Grant, Amounts]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)  # by the minute it began in


async def _exactness(
    where: str, clock: _Clock, limits: Limits, seed: int, minutes: int
) -> list[Figure]:
    chance = random.Random(seed)
    loads = [_load(number, minutes) for number in range(TENANTS)]
    start, number = clock.now, itertools.count()
    for tick in range(round(minutes * 60 / TICK_S)):
        clock.now = start + tick * TICK_S
        minute = int(tick * TICK_S // 60)
        for load in loads:
            _end_some(load, limits, clock.now)
        asking = (_ask(load, minute, limits, clock, chance, number) for load in loads)
        await asyncio.gather(*asking)
    return list(_deviations(where, loads))


async def _ask(
    load: _Load,
    minute: int,
    limits: Limits,
    clock: _Clock,
    chance: random.Random,
    number: Iterator[int],
) -> None:
    load.owed += load.limit * OVERLOAD / 60 * TICK_S
    while load.owed > 0 and clock.now >= load.patient_until:
        answer = chance.randint(*ANSWER)
        wanted = Amounts(1, chance.randint(*PROMPT), answer)
        spent = wanted._replace(output_tokens=answer // 2)
        load.owed -= spent[load.kind]
        which = next(number)
        try:
            grant = await limits.reserve(load.tenant, Claim(str(which), wanted))
        except RateLimited as refused:
            load.patient_until = clock.now + min(refused.retry_after_s, PATIENCE_S)
            break
        except NoWorker:  # Redis took longer than a call may: this machine is busy
            await asyncio.sleep(BREATH_S)
            continue
        load.used[minute] += spent[load.kind]
        ends = clock.now + chance.uniform(0, LAST_S)
        heapq.heappush(load.running, (ends, which, grant, spent))


def _end_some(load: _Load, limits: Limits, now: float) -> None:
    while load.running and load.running[0][0] <= now:
        _, _, grant, spent = heapq.heappop(load.running)
        limits.settle(grant, spent)


def _load(number: int, minutes: int) -> _Load:
    kind = Kind(number % len(LIMITS))
    limits = LIMITS[kind]
    limit = limits.capacities()[kind]
    return _Load(Tenant(f"tenant-{number}", limits=limits), kind, limit or 0, used=[0] * minutes)


def _deviations(where: str, loads: list[_Load]) -> Iterator[Figure]:
    for kind in Kind:
        mine = [load for load in loads if load.kind is kind]
        shares = [(used / load.limit - 1) * 100 for load in mine for used in load.used]
        name = f"{kind.words} in a minute, {where}"
        most = max(0.0, *shares)
        least = max(0.0, *(-share for share in shares))
        yield Figure(PART, f"{name}: most beyond the limit", most, "%", "<= 1 %")
        yield Figure(PART, f"{name}: most below it", least, "%", "<= 1 %")


# -- what it takes ---------------------------------------------------------------------------------


async def _make_directory() -> tuple[list[str], Directory]:
    keys = [new_key() for _ in range(KEYS)]
    known = KeySet(
        ApiKey(f"tenant-{number % TENANTS}", digest_of(key)) for number, key in enumerate(keys)
    )
    tenants = {name: Tenant(name) for name in (f"tenant-{number}" for number in range(TENANTS))}
    directory = Directory(_Given(known), _Given(tenants))
    await directory.load()
    return keys, directory


@dataclass(frozen=True, slots=True)
class _Given(Generic[Value]):
    """A source that never changes."""

    value: Value

    async def read(self) -> Value:
        return self.value

    async def aclose(self) -> None:
        return


@asynccontextmanager
async def _running(limits: RedisLimits) -> AsyncIterator[RedisLimits]:
    task = asyncio.create_task(limits.run())
    try:
        yield limits
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await limits.aclose()


@asynccontextmanager
async def _own_redis() -> AsyncIterator[str | None]:
    """The URL of a Redis for this alone, in memory, behind a socket; None where there is none."""
    binary = shutil.which("redis-server")
    if binary is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "redis.sock"
        server = await asyncio.create_subprocess_exec(
            *(binary, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", folder),
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(READY_S):
                while not path.exists():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            yield f"unix://{path}"
        finally:
            server.terminate()
            await server.wait()
