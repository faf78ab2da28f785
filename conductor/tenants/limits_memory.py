"""Limits of one conductor, in its memory."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from conductor.tenants.buckets import Bucket
from conductor.tenants.limits import CONCURRENT, Claim, Grant, Standing, bounded, refuse
from conductor.tenants.tenant import Amounts, Kind, Tenant, TenantLimits


class MemoryLimits:
    """Implements Limits. `clock` gives seconds, by default the running loop's. `share` is the part
    of every limit that is ours: less than 1 while several conductors cannot agree."""

    def __init__(
        self,
        clock: Callable[[], float] | None = None,
        share: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._clock = clock or asyncio.get_running_loop().time
        self._share = share
        self._accounts: dict[str, _Account] = {}  # by tenant
        self._numbers = itertools.count()

    async def reserve(self, tenant: Tenant, claim: Claim) -> Grant:
        share, now_ms = self._share(), self._now_ms()
        account = self._account(tenant, share)
        reserved = bounded(claim, account.capacities)
        allowed = tenant.limits.concurrent_requests
        if allowed is not None and claim.key not in account.running:
            running = len(account.running)
            if running >= max(1, int(allowed * share)):
                refuse(tenant, CONCURRENT, 1, running, 0)
        account.check(tenant, reserved, now_ms)
        slot = account.take(reserved, now_ms)
        nonce = str(next(self._numbers))
        account.running[claim.key] = nonce
        return Grant(tenant, claim.key, nonce, reserved, slot, shared=False)

    def settle(self, grant: Grant, spent: Amounts) -> None:
        account = self._accounts.get(grant.tenant.name)
        if account is None:
            return
        if account.running.get(grant.key) == grant.nonce:
            del account.running[grant.key]
        if account.window_ms == _ms(grant.tenant.limits.window_s):
            account.settle(grant, spent, self._now_ms())

    def standing(self, tenant: Tenant) -> Standing | None:
        account = self._accounts.get(tenant.name)
        return None if account is None else account.standing(self._now_ms())

    async def run(self) -> None:
        return

    async def aclose(self) -> None:
        return

    def _account(self, tenant: Tenant, share: float) -> _Account:
        """The tenant's; changed limits count from now on. With another window it begins anew, but
        for what runs."""
        account = self._accounts.get(tenant.name)
        window_ms = _ms(tenant.limits.window_s)
        if account is None or account.window_ms != window_ms:
            running = account.running if account is not None else {}
            account = self._accounts[tenant.name] = _Account(window_ms, running)
        account.allow(tenant.limits, share)
        return account

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


class _Account:
    """One tenant's buckets, by kind, and what runs: nonces by key."""

    def __init__(self, window_ms: int, running: dict[str, str]) -> None:
        self.window_ms = window_ms
        self.running = running
        self.capacities: tuple[int | None, ...] = ()
        self._allowed: tuple[TenantLimits, float] | None = None
        self._buckets = tuple(Bucket(0, window_ms) for _ in Kind)

    def allow(self, limits: TenantLimits, share: float) -> None:
        if self._allowed == (limits, share):
            return
        self._allowed = (limits, share)
        self.capacities = limits.capacities(share)

    def check(self, tenant: Tenant, wanted: Amounts, now_ms: int) -> None:
        """Raises RateLimited for the kind that is free last."""
        worst: tuple[int, Kind] | None = None
        for kind in Kind:
            capacity, bucket = self.capacities[kind], self._buckets[kind]
            if capacity is None:
                continue
            bucket.capacity = capacity
            wait_ms = bucket.wait_ms(wanted[kind], now_ms) or 0
            if wait_ms and (worst is None or wait_ms > worst[0]):
                worst = wait_ms, kind
        if worst is not None:
            wait_ms, kind = worst
            used = self._buckets[kind].used(now_ms)
            refuse(tenant, kind, wanted[kind], used, wait_ms)

    def take(self, amounts: Amounts, now_ms: int) -> int:
        """Returns the slot."""
        for kind in Kind:
            if amounts[kind]:
                self._buckets[kind].take(amounts[kind], now_ms)
        return self._buckets[0].slot(now_ms)

    def settle(self, grant: Grant, spent: Amounts, now_ms: int) -> None:
        for kind in Kind:
            self._buckets[kind].settle(grant.reserved[kind], spent[kind], grant.slot, now_ms)

    def standing(self, now_ms: int) -> Standing:
        return Standing(
            now_ms / 1e3,
            self.capacities,
            tuple(bucket.used(now_ms) for bucket in self._buckets),
            tuple(bucket.full_ms(now_ms) / 1e3 for bucket in self._buckets),
            len(self.running),
        )


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
