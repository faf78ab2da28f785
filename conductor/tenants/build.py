"""Tenancy as the options of a conductor say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from baton.keys.file import read_keys
from baton.keys.key import KeySet
from baton.keys.store import open_redis_keys
from baton.rpc.registry import Registry
from conductor.tenants.directory import Directory
from conductor.tenants.limits import Limits
from conductor.tenants.limits_memory import MemoryLimits
from conductor.tenants.metrics import TenantMetrics
from conductor.tenants.options import IN_REDIS, TenancyOptions
from conductor.tenants.sources import FileSource, Source, StoreSource
from conductor.tenants.tenancy import Tenancy
from conductor.tenants.tenant import Tenant
from conductor.tenants.tenant_file import read_tenants


def build_tenancy(
    options: TenancyOptions, registry: Registry | None, metrics: TenantMetrics
) -> Tenancy:
    """Make it inside the running event loop."""
    keys: Source[KeySet] | None = None
    tenants: Source[Mapping[str, Tenant]] | None = None
    if options.keys:
        tenants = FileSource(Path(options.tenants), read_tenants)
        keys = _key_source(options)
    directory = Directory(keys, tenants, options.plain_keys, metrics.note_reload)
    return Tenancy(directory, _limits(options, registry, metrics), metrics)


def _key_source(options: TenancyOptions) -> Source[KeySet]:
    if options.keys == IN_REDIS and options.redis is not None:
        return StoreSource(open_redis_keys(options.redis))
    return FileSource(Path(options.keys), read_keys)


def _limits(options: TenancyOptions, registry: Registry | None, metrics: TenantMetrics) -> Limits:
    """Shared where there is a Redis, and somebody to be limited."""
    if options.redis is None or registry is None or not options.tenants:
        return MemoryLimits()
    from conductor.tenants.limits_redis import RedisLimits  # needs the client library

    fleet = Conductors(registry)
    local = MemoryLimits(share=lambda: 1 / fleet.count) if options.local_without_redis else None
    return RedisLimits(options.redis, local, metrics.fallbacks.inc, look=fleet.look)


class Conductors:
    """How many share the limits, as long as the registry could tell."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.count = 1

    async def look(self) -> None:
        """Raises RegistryUnavailable."""
        self.count = max(1, len(await self._registry.conductors()))
