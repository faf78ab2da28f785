"""Tenants: whose a request is, what it may ask for, and how much of it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

MINUTE_S = 60.0


class Kind(IntEnum):
    """What is limited by the minute: a place in `Amounts`."""

    REQUESTS = 0
    INPUT = 1
    OUTPUT = 2

    @property
    def words(self) -> str:
        return ("requests", "input tokens", "output tokens")[self]

    @property
    def label(self) -> str:
        """In headers and metrics."""
        return ("requests", "input-tokens", "output-tokens")[self]


class Amounts(NamedTuple):
    """Of each kind, what a request takes, or has used."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """None = no limit. What is allowed in a minute is allowed in equal parts in each `window_s`
    seconds: a shorter window lets less through at once."""

    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    window_s: float = MINUTE_S

    @property
    def unlimited(self) -> bool:
        return self.concurrent_requests is None and not any(
            capacity is not None for capacity in self.capacities()
        )

    def capacities(self, share: float = 1.0) -> tuple[int | None, ...]:
        """By kind, what is allowed in a window; `share` of it, but not less than 1."""
        minutes = self.window_s / MINUTE_S * share
        return tuple(
            None if limit is None else max(1, int(limit * minutes))
            for limit in (
                self.requests_per_minute,
                self.input_tokens_per_minute,
                self.output_tokens_per_minute,
            )
        )


@dataclass(frozen=True, slots=True)
class Tenant:
    """`priority` is the most urgent that its requests may have (less is more urgent); None: any.
    `models` None: all. An `admin` sees what belongs to other tenants, too."""

    name: str
    cache_salt: str = field(default="", repr=False)  # "": prompts are shared as without tenants
    priority: int | None = 0
    models: frozenset[str] | None = None
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None  # of one answer
    limits: TenantLimits = field(default_factory=TenantLimits)
    admin: bool = False

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to the tenant `owner` is shown."""
        return self.admin or self.name == owner

    def salted(self, salt: str) -> str:
        """The salt of a request together with ours: no choice of a request's reaches another
        tenant's KV. Its length is fixed, and ours does not show."""
        if not self.cache_salt:
            return salt
        key = hashlib.blake2b(self.cache_salt.encode(), digest_size=32).digest()
        theirs = salt.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(theirs, key=key, digest_size=16).hexdigest()


ANYBODY = Tenant("", priority=None, admin=True)
"""Who asks a conductor that has no keys."""

KEY_HOLDER = Tenant("default", priority=None, admin=True)
"""Whoever has one of `--api-key`."""
