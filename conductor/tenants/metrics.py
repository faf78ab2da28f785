"""Metrics of tenants. Labels are names from the operator's own file, a hundred at most."""

from __future__ import annotations

from baton import telemetry
from conductor.tenants.tenant import Amounts

MAX_TENANTS = 100
OTHER = "other"


class TenantMetrics:
    def __init__(self, metrics: telemetry.Metrics) -> None:
        self._names: set[str] = set()
        self.tokens = metrics.counter(
            "baton_tenant_tokens",
            "Tokens that were settled with tenants who have a key.",
            ["tenant", "kind"],
        )
        self.refusals = metrics.counter(
            "baton_tenant_refusals",
            "Requests that a tenant's limit turned away: requests, input-tokens, output-tokens, "
            "concurrent.",
            ["tenant", "reason"],
        )
        self.bad_keys = metrics.counter(
            "baton_unauthenticated", "Requests without an API key that holds."
        )
        self.reloads = metrics.counter(
            "baton_key_reloads", "Changes of keys or tenants, by how reading went.", ["outcome"]
        )
        self.fallbacks = metrics.counter(
            "baton_limit_fallbacks",
            "Requests held against a conductor's own part of the limits, because Redis was away.",
        )

    def label(self, tenant: str) -> str:
        """The name, or `other` behind the first hundred."""
        if tenant in self._names:
            return tenant
        if len(self._names) >= MAX_TENANTS:
            return OTHER
        self._names.add(tenant)
        return tenant

    def note_spent(self, tenant: str, spent: Amounts) -> None:
        label = self.label(tenant)
        self.tokens.labels(label, "input").inc(spent.input_tokens)
        self.tokens.labels(label, "output").inc(spent.output_tokens)

    def note_refusal(self, tenant: str, reason: str) -> None:
        self.refusals.labels(self.label(tenant), reason).inc()

    def note_reload(self, outcome: str) -> None:
        self.reloads.labels(outcome).inc()
