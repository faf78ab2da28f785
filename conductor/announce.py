"""A conductor's lease in the registry, so that workers find it."""

from __future__ import annotations

import asyncio
import contextlib

from baton.errors import RegistryUnavailable
from baton.rpc.registry import Registry
from baton.types.registry import ConductorInfo


async def announce(registry: Registry, info: ConductorInfo, ttl_s: float) -> None:
    """Renew the lease every third of `ttl_s` until cancelled; then withdraw it.

    While the registry is away, workers keep the conductors that they know. One that has lost its
    entries has them again after `ttl_s / 3`.
    """
    try:
        while True:
            with contextlib.suppress(RegistryUnavailable):  # it logs that it is away
                await registry.announce(info, ttl_s)
            await asyncio.sleep(ttl_s / 3)
    finally:
        with contextlib.suppress(RegistryUnavailable):
            await registry.withdraw(info.incarnation)
