"""Limits that the conductors of a cluster share, in Redis; see `limits_script` for its keys.

A reservation is one round trip; nobody waits for a settlement. What a conductor that was killed had
reserved comes back by itself: tokens when their window has passed, a place among the running
requests when its lease ends.

While Redis is away each conductor keeps 1/N of every limit by itself, or lets nothing in.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

from baton.errors import NoWorker, RegistryUnavailable
from baton.rpc.redis_calls import RedisCalls
from baton.rpc.redis_options import RedisOptions
from conductor.tenants.buckets import SLOTS
from conductor.tenants.limits import CONCURRENT, Claim, Grant, Standing, bounded, refuse
from conductor.tenants.limits_memory import MemoryLimits
from conductor.tenants.limits_script import RENEW, RESERVE, SETTLE
from conductor.tenants.script_calls import Reply, ScriptCalls
from conductor.tenants.tenant import Amounts, Kind, Tenant

LEASE_S = 15.0  # of a running request, renewed by its conductor
NONE = -1  # no limit; no time given

log = logging.getLogger(__name__)


class LimitsUnavailable(NoWorker):
    """Redis is away, and nothing is let in that cannot be counted."""

    code = "limits_unavailable"


class RedisLimits:
    """Implements Limits. Make it inside the running event loop; it reserves while `run` runs.

    `local` takes over while Redis is away; None: requests are refused. `on_fallback` hears of each
    that it takes. `look` is called now and then while Redis is there, so that `local` knows its
    share later. `clock` gives the time in seconds instead of Redis, for tests and benchmarks."""

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
        self._calls = ScriptCalls(self._redis)
        self._scripts = [self._calls.script(source) for source in (RESERVE, SETTLE, RENEW)]
        self._prefix = options.keys
        self._local = local
        self._on_fallback = on_fallback
        self._clock = clock
        self._lease_s = lease_s
        self._look = look
        self._loop = asyncio.get_running_loop()
        self._life = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._standings: dict[str, Standing] = {}
        self._running: dict[str, dict[str, str]] = defaultdict(dict)  # tenant -> key -> nonce

    async def reserve(self, tenant: Tenant, claim: Claim) -> Grant:
        capacities = tenant.limits.capacities()
        amounts = bounded(claim, capacities)
        nonce = f"{self._life}-{next(self._numbers)}"
        reply = self._start_reserving(tenant, capacities, amounts, claim.key, nonce)

        def granted(slot: int) -> Grant:
            return Grant(tenant, claim.key, nonce, amounts, slot, shared=True)

        try:
            told = await asyncio.shield(reply)
        except RegistryUnavailable as error:
            return await self._reserve_locally(tenant, claim, error)
        except asyncio.CancelledError:  # the client has gone, and what it was granted goes back
            reply.add_done_callback(lambda done: self._undo(done, granted))
            raise
        self._note(tenant, told)
        is_granted, reason, wait_ms, slot = told[:4]
        if not is_granted:
            if not reason:
                refuse(tenant, CONCURRENT, 1, told[10], wait_ms)
            kind = Kind(reason - 1)
            refuse(tenant, kind, amounts[kind], told[3 + reason], wait_ms)
        if tenant.limits.concurrent_requests is not None:
            self._running[tenant.name][claim.key] = nonce
        return granted(slot)

    def settle(self, grant: Grant, spent: Amounts) -> None:
        if not grant.shared:
            if self._local is not None:
                self._local.settle(grant, spent)
            return
        tenant = grant.tenant
        if self._running[tenant.name].get(grant.key) == grant.nonce:
            del self._running[tenant.name][grant.key]
        arguments = [*self._window(tenant), grant.slot, *grant.reserved, *spent]
        reply = self._calls.start(
            self._scripts[1], self._keys(tenant), [*arguments, grant.key, grant.nonce]
        )
        reply.add_done_callback(lambda done: self._on_settled(tenant, done))

    def standing(self, tenant: Tenant) -> Standing | None:
        return self._standings.get(tenant.name)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._calls.run(), name="limits in Redis")
            tasks.create_task(self._keep_renewing(), name="leases of limits")

    async def aclose(self) -> None:
        await self._redis.aclose()

    async def renew(self) -> None:
        """The leases of all that run here. Raises RegistryUnavailable."""
        lease_ms = round(self._lease_s * 1000)
        for tenant, running in list(self._running.items()):
            if running:
                keys = [f"{self._prefix}:running:{tenant}", f"{self._prefix}:owner:{tenant}"]
                arguments = [self._now_ms(), lease_ms, *running]
                await self._calls.start(self._scripts[2], keys, arguments)

    async def _reserve_locally(self, tenant: Tenant, claim: Claim, why: Exception) -> Grant:
        if self._local is None:
            raise LimitsUnavailable(
                "limits cannot be checked at the moment: try again in a second"
            ) from why
        self._on_fallback()
        try:
            return await self._local.reserve(tenant, claim)
        finally:
            if (standing := self._local.standing(tenant)) is not None:
                self._standings[tenant.name] = standing

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self.renew()
                if self._look is not None:
                    await self._look()
            except RegistryUnavailable as error:
                log.debug("leases were not renewed: %s", error)

    def _undo(self, done: asyncio.Future[Reply], granted: Callable[[int], Grant]) -> None:
        if not done.cancelled() and done.exception() is None:
            is_granted, _, _, slot = done.result()[:4]
            if is_granted:
                self.settle(granted(slot), Amounts())

    def _on_settled(self, tenant: Tenant, done: asyncio.Future[Reply]) -> None:
        """One that is lost comes back as what a killed conductor had."""
        if done.cancelled() or (error := done.exception()) is not None:
            log.debug("a settlement was lost: %s", error)
        else:
            self._note(tenant, done.result())

    def _start_reserving(
        self,
        tenant: Tenant,
        capacities: tuple[int | None, ...],
        amounts: Amounts,
        key: str,
        nonce: str,
    ) -> asyncio.Future[Reply]:
        most = tenant.limits.concurrent_requests
        arguments: list[Any] = [
            *self._window(tenant),
            *(NONE if capacity is None else capacity for capacity in capacities),
            *amounts,
            NONE if most is None else most,
            key,
            nonce,
            round(self._lease_s * 1000),
        ]
        return self._calls.start(self._scripts[0], self._keys(tenant), arguments)

    def _keys(self, tenant: Tenant) -> list[str]:
        window_ms = round(tenant.limits.window_s * 1000)
        return [
            f"{self._prefix}:limit:{tenant.name}:{window_ms}",
            f"{self._prefix}:running:{tenant.name}",
            f"{self._prefix}:owner:{tenant.name}",
        ]

    def _window(self, tenant: Tenant) -> list[int]:
        """The first arguments of both scripts."""
        return [self._now_ms(), round(tenant.limits.window_s * 1000), SLOTS]

    def _note(self, tenant: Tenant, reply: Reply) -> None:
        used, full_s = tuple(reply[4:7]), tuple(each / 1e3 for each in reply[7:10])
        self._standings[tenant.name] = Standing(
            self._loop.time(), tenant.limits.capacities(), used, full_s, reply[10]
        )

    def _now_ms(self) -> int:
        return NONE if self._clock is None else int(self._clock() * 1000)
