"""A conductor's lease in the registry, so that workers find it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from baton.errors import RegistryUnavailable
from baton.rpc.registry import Registry
from baton.types.registry import ConductorInfo

RETRY_S = 1.0  # while the registry is away


async def announce(
    registry: Registry, info: ConductorInfo, ttl_s: float, on_new: Callable[[], None]
) -> None:
    """Renew the lease every third of `ttl_s` until cancelled; then withdraw it.

    While the registry is away, workers keep the conductors that they know. `on_new` is called when
    the registry did not know this one: at first, and when it has lost its entries.
    """
    try:
        while True:
            pause_s = ttl_s / 3
            try:
                if not await registry.announce(info, ttl_s):
                    on_new()
            except RegistryUnavailable:  # it logs that it is away
                pause_s = min(pause_s, RETRY_S)
            await asyncio.sleep(pause_s)
    finally:
        with contextlib.suppress(RegistryUnavailable):
            await registry.withdraw(info.incarnation)
