"""The seam of limits: reserve what a request may take, settle what it took.

`limits_memory` keeps the accounts of one conductor, `limits_redis` those that conductors share. A
reservation is made before any work is spent, and settled once, whatever the request's end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, Protocol

from baton.errors import InvalidRequest, RateLimited
from conductor.tenants.tenant import Amounts, Kind, Tenant

CONCURRENT = "concurrent"  # the reason for a refusal that is not a Kind
CONCURRENT_RETRY_S = 1.0  # nobody knows when a running request ends


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request may take at most. `key` names it: who comes back for the rest of an answer
    makes a claim with the same key, which takes the place of the first one among those that run."""

    key: str
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Grant:
    """A claim that was let in. `nonce` tells it from others with the same key; `slot` is the one of
    the buckets that it was taken in."""

    tenant: Tenant
    key: str
    nonce: str
    reserved: Amounts
    slot: int
    shared: bool  # whether Redis knows it


@dataclass(frozen=True, slots=True)
class Standing:
    """How a tenant stands, as it was last seen, at `at_s` of the loop's time. By kind: what is
    allowed in a window (None: no limit), what is used of it, seconds until all is free."""

    at_s: float
    capacities: tuple[int | None, ...]
    used: tuple[int, ...]
    full_s: tuple[float, ...]
    running: int


class Limits(Protocol):
    async def reserve(self, tenant: Tenant, claim: Claim) -> Grant:
        """Raises RateLimited, or InvalidRequest for a claim that can never be let in."""

    def settle(self, grant: Grant, spent: Amounts) -> None:
        """The request has ended. Does not wait, and does not fail."""

    def standing(self, tenant: Tenant) -> Standing | None:
        """None when nothing is known yet, or the tenant has no limits."""

    async def run(self) -> None:
        """Whatever has to be done meanwhile, as long as it has to."""

    async def aclose(self) -> None:
        """Close connections."""


def bounded(claim: Claim, capacities: tuple[int | None, ...]) -> Amounts:
    """What to reserve. Raises InvalidRequest when the prompt alone is more than a window allows. Of
    output, the whole bucket at most: an answer that may be longer seldom is, and what it takes
    beyond that is taken when it ends."""
    amounts = claim.amounts
    allowed = capacities[Kind.INPUT]
    if allowed is not None and amounts.input_tokens > allowed:
        raise InvalidRequest(
            f"the prompt has {amounts.input_tokens} tokens, more than the {allowed} input tokens "
            "that this API key's tenant may send at once: shorten it",
            param="prompt",
            code="prompt_exceeds_limit",
        )
    most = capacities[Kind.OUTPUT]
    if most is not None and amounts.output_tokens > most:
        return amounts._replace(output_tokens=most)
    return amounts


def refuse(tenant: Tenant, reason: Kind | str, amount: int, used: int, wait_ms: int) -> NoReturn:
    """Raises RateLimited."""
    if not isinstance(reason, Kind):
        raise LimitReached(
            f"{used} requests of the tenant {tenant.name!r} are running, its limit is "
            f"{tenant.limits.concurrent_requests}: wait until one has ended",
            CONCURRENT,
            CONCURRENT_RETRY_S,
        )
    minute = (
        tenant.limits.requests_per_minute,
        tenant.limits.input_tokens_per_minute,
        tenant.limits.output_tokens_per_minute,
    )[reason]
    wait_s = max(wait_ms, 1) / 1e3
    raise LimitReached(
        f"the tenant {tenant.name!r} has used its {reason.words} for now (limit: {minute} a "
        f"minute, used or reserved: {used}, this request: {amount}): try again in {wait_s:.3g} s",
        reason.label,
        wait_s,
    )


class LimitReached(RateLimited):
    """With the limit that was reached, for metrics."""

    def __init__(self, message: str, reason: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.reason = reason
