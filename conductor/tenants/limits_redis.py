"""Limits that the conductors of a cluster share, in Redis; see `limits_script` for its keys.

A reservation is one round trip. Settlements are sent behind the requests' backs, many at a time.
What a conductor that was killed had reserved comes back by itself: tokens when their window has
passed, a place among the running requests when its lease ends.

While Redis is away each conductor keeps 1/N of every limit by itself, or lets nothing in.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import secrets
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from redis.exceptions import NoScriptError

from baton.errors import NoWorker, RegistryUnavailable
from baton.rpc.redis_calls import RedisCalls
from baton.rpc.redis_options import RedisOptions
from conductor.tenants.buckets import SLOTS
from conductor.tenants.limits import CONCURRENT, Claim, Grant, Standing, bounded, refuse
from conductor.tenants.limits_memory import MemoryLimits
from conductor.tenants.limits_script import RENEW, RESERVE, SETTLE
from conductor.tenants.tenant import Amounts, Kind, Tenant

LEASE_S = 15.0  # of a running request, renewed by its conductor
BATCH = 256  # settlements that are sent together
FLUSH_S = 1.0  # to send what is left at the end
NONE = -1  # no limit; no time given

log = logging.getLogger(__name__)


class LimitsUnavailable(NoWorker):
    """Redis is away, and nothing is let in that cannot be counted."""

    code = "limits_unavailable"


class RedisLimits:
    """Implements Limits. Make it inside the running event loop. `local` takes over while Redis is
    away; None: requests are refused. `on_fallback` hears of each that it takes. `clock` gives the
    time in seconds instead of Redis, for tests and benchmarks. `look` is called now and then while
    Redis is there, so that `local` knows its share later."""

    def __init__(
        self,
        options: RedisOptions,
        local: MemoryLimits | None,
        on_fallback: Callable[[], None] = lambda: None,
        clock: Callable[[], float] | None = None,
        lease_s: float = LEASE_S,
        look: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._redis = RedisCalls(options)
        self._prefix = options.keys
        self._local = local
        self._on_fallback = on_fallback
        self._clock = clock
        self._lease_s = lease_s
        self._look = look
        self._loop = asyncio.get_running_loop()
        self._reserve = self._redis.client.register_script(RESERVE)
        self._settle = self._redis.client.register_script(SETTLE)
        self._renew = self._redis.client.register_script(RENEW)
        self._life = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._standings: dict[str, Standing] = {}
        self._running: dict[str, dict[str, str]] = defaultdict(dict)  # tenant -> key -> nonce
        self._unsent: deque[tuple[Grant, Amounts]] = deque()
        self._wake = asyncio.Event()

    async def reserve(self, tenant: Tenant, claim: Claim) -> Grant:
        capacities = tenant.limits.capacities()
        amounts = bounded(claim, capacities)
        nonce = f"{self._life}-{next(self._numbers)}"
        arguments = self._arguments(tenant, capacities, amounts, claim.key, nonce)
        try:
            reply = await self._redis.call(lambda: self._reserve(self._keys(tenant), arguments))
        except RegistryUnavailable as error:
            return await self._reserve_locally(tenant, claim, error)
        except asyncio.CancelledError:
            # It may have been granted. Tokens come back by themselves, the place need not wait.
            unknown = Grant(tenant, claim.key, nonce, Amounts(), NONE, shared=True)
            self.settle(unknown, Amounts())
            raise
        granted, reason, wait_ms, slot = reply[:4]
        self._note(tenant, capacities, reply)
        if not granted:
            if not reason:
                refuse(tenant, CONCURRENT, 1, reply[10], wait_ms)
            kind = Kind(reason - 1)
            refuse(tenant, kind, amounts[kind], reply[3 + reason], wait_ms)
        if tenant.limits.concurrent_requests is not None:
            self._running[tenant.name][claim.key] = nonce
        return Grant(tenant, claim.key, nonce, amounts, slot, shared=True)

    def settle(self, grant: Grant, spent: Amounts) -> None:
        if not grant.shared:
            if self._local is not None:
                self._local.settle(grant, spent)
            return
        if self._running[grant.tenant.name].get(grant.key) == grant.nonce:
            del self._running[grant.tenant.name][grant.key]
        self._unsent.append((grant, spent))
        self._wake.set()

    def standing(self, tenant: Tenant) -> Standing | None:
        return self._standings.get(tenant.name)

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_settling(), name="settle")
                tasks.create_task(self._keep_renewing(), name="renew")
        finally:
            await self._flush()

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def settled(self) -> None:
        """Send what is not sent. Raises RegistryUnavailable; what was on its way is lost then, and
        comes back as what a killed conductor had."""
        while self._unsent:
            batch = [self._unsent.popleft() for _ in range(min(BATCH, len(self._unsent)))]
            await self._redis.call(functools.partial(self._send, batch))

    async def _reserve_locally(self, tenant: Tenant, claim: Claim, why: Exception) -> Grant:
        if self._local is None:
            raise LimitsUnavailable(
                "limits cannot be checked at the moment: try again in a second"
            ) from why
        self._on_fallback()
        grant = await self._local.reserve(tenant, claim)
        if (standing := self._local.standing(tenant)) is not None:
            self._standings[tenant.name] = standing
        return grant

    async def _keep_settling(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self.settled()
            except RegistryUnavailable as error:
                log.debug("settlements were lost: %s", error)

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._renew_all()
                if self._look is not None:
                    await self._look()
            except RegistryUnavailable as error:
                log.debug("leases were not renewed: %s", error)

    async def _renew_all(self) -> None:
        lease_ms = round(self._lease_s * 1000)
        for tenant, running in list(self._running.items()):
            if not running:
                continue
            keys = [f"{self._prefix}:running:{tenant}", f"{self._prefix}:owner:{tenant}"]
            renew = functools.partial(self._renew, keys, [self._now_ms(), lease_ms, *running])
            await self._redis.call(renew)

    async def _flush(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_S):
                await self.settled()
        except (RegistryUnavailable, TimeoutError):
            log.warning("%d settlements were not sent before the end", len(self._unsent))

    async def _send(self, batch: Sequence[tuple[Grant, Amounts]]) -> None:
        replies = await self._send_once(batch)
        if any(isinstance(reply, NoScriptError) for reply in replies):  # Redis has restarted
            await self._redis.client.script_load(SETTLE)
            replies = await self._send_once(batch)
        for (grant, _), reply in zip(batch, replies, strict=True):
            if isinstance(reply, Exception):
                raise reply
            self._note(grant.tenant, grant.tenant.limits.capacities(), reply)

    async def _send_once(self, batch: Sequence[tuple[Grant, Amounts]]) -> list[Any]:
        pipeline = self._redis.client.pipeline(transaction=False)
        for grant, spent in batch:
            keys = self._keys(grant.tenant)
            window_ms = round(grant.tenant.limits.window_s * 1000)
            arguments = [self._now_ms(), window_ms, SLOTS, grant.slot, *grant.reserved, *spent]
            pipeline.evalsha(self._settle.sha, len(keys), *keys, *arguments, grant.key, grant.nonce)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    def _keys(self, tenant: Tenant) -> list[str]:
        window = round(tenant.limits.window_s * 1000)
        return [
            f"{self._prefix}:limit:{tenant.name}:{window}",
            f"{self._prefix}:running:{tenant.name}",
            f"{self._prefix}:owner:{tenant.name}",
        ]

    def _arguments(
        self,
        tenant: Tenant,
        capacities: tuple[int | None, ...],
        amounts: Amounts,
        key: str,
        nonce: str,
    ) -> list[Any]:
        limits = tenant.limits
        most = limits.concurrent_requests
        return [
            self._now_ms(),
            round(limits.window_s * 1000),
            SLOTS,
            *(NONE if capacity is None else capacity for capacity in capacities),
            *amounts,
            NONE if most is None else most,
            key,
            nonce,
            round(self._lease_s * 1000),
        ]

    def _note(self, tenant: Tenant, capacities: tuple[int | None, ...], reply: list[Any]) -> None:
        used, full_ms = tuple(reply[4:7]), reply[7:10]
        full_s = tuple(each / 1e3 for each in full_ms)
        self._standings[tenant.name] = Standing(
            self._loop.time(), capacities, used, full_s, reply[10]
        )

    def _now_ms(self) -> int:
        return NONE if self._clock is None else int(self._clock() * 1000)
