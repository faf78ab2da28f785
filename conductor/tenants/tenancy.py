"""What the conductor asks about tenants: who is it, what may it ask for, and is any of it left?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from baton.errors import BatonError, InvalidApiKey, PermissionDenied
from conductor.request import Ask, Request
from conductor.tenants.directory import Directory
from conductor.tenants.headers import limit_headers
from conductor.tenants.limits import Claim, Grant, LimitReached, Limits
from conductor.tenants.limits_memory import MemoryLimits
from conductor.tenants.metrics import TenantMetrics
from conductor.tenants.tenant import Amounts, Tenant


@dataclass(slots=True)
class Spending:
    """Of one request. `usage` says at the end what it took: nothing, when it was never begun."""

    usage: Callable[[], Amounts] = Amounts


class Tenancy:
    """Make it inside the running event loop; `run` owns what has to be done meanwhile."""

    def __init__(self, directory: Directory, limits: Limits, metrics: TenantMetrics) -> None:
        self.directory = directory
        self._limits = limits
        self._metrics = metrics
        self._clock = asyncio.get_running_loop().time

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.directory.run(), name="keys")
            tasks.create_task(self._limits.run(), name="limits")

    async def aclose(self) -> None:
        """Close connections, when `run` has ended."""
        await self.directory.aclose()
        await self._limits.aclose()

    def authenticate(self, authorization: str | None) -> Tenant:
        """Raises InvalidApiKey, or KeysUnknown."""
        try:
            return self.directory.find(authorization)
        except InvalidApiKey:
            self._metrics.bad_keys.inc()
            raise

    @asynccontextmanager
    async def reserved(self, request: Request) -> AsyncGenerator[Spending, None]:
        """Hold what the request may take at most; what it has not taken at the end is given back.
        Raises RateLimited, or InvalidRequest for what can never be let in."""
        tenant, spending = request.tenant, Spending()
        grant = await self._reserve(request)
        failed = False
        try:
            yield spending
        except BatonError:
            failed = True
            raise
        finally:
            spent = spending.usage()
            if failed and not spent.output_tokens:
                spent = Amounts()  # who got nothing, by no fault of their own, pays nothing
            if grant is not None:
                self._limits.settle(grant, spent)
            if tenant.name:
                self._metrics.note_spent(tenant.name, spent)

    async def _reserve(self, request: Request) -> Grant | None:
        tenant = request.tenant
        if tenant.limits.unlimited:
            return None
        try:
            return await self._limits.reserve(tenant, _claim(request))
        except LimitReached as error:
            self._metrics.note_refusal(tenant.name, error.reason)
            raise

    def headers(self, tenant: Tenant) -> dict[str, str]:
        """How the tenant stands; empty without limits."""
        if tenant.limits.unlimited:
            return {}
        return limit_headers(self._limits.standing(tenant), self._clock())


TenancyMaker = Callable[[TenantMetrics], Tenancy]


def open_tenancy(metrics: TenantMetrics) -> Tenancy:
    """Everybody may ask for everything."""
    return Tenancy(Directory(), MemoryLimits(), metrics)


def restrict(ask: Ask, tenant: Tenant) -> Ask:
    """The same request as the tenant may make it. Raises PermissionDenied."""
    check_allowed(tenant, ask.model)
    priority = ask.priority if tenant.priority is None else max(ask.priority, tenant.priority)
    salt = tenant.salted(ask.cache_salt)
    if (priority, salt) == (ask.priority, ask.cache_salt):
        return ask
    return replace(ask, priority=priority, cache_salt=salt)


def check_allowed(tenant: Tenant, model: str) -> None:
    """Raises PermissionDenied."""
    if not tenant.may_use(model):
        raise PermissionDenied(
            f"the tenant {tenant.name!r} may not use this model", "model_not_allowed", "model"
        )


def _claim(request: Request) -> Claim:
    output = sum(answer.sampling.max_tokens for answer in request.answers)
    return Claim(request.key, Amounts(1, request.prompt_tokens, output))
