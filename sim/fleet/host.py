"""A process of the datacentre: what it is now, how its life is served, and how it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from baton.rpc.memory import MemoryNetwork
from baton.types.fleet import Role, WorkerInfo
from baton.worker.conductors import ConductorSet
from baton.worker.lifecycle import StopSignals
from baton.worker.serving import Service, live
from sim.fleet.device import ModelledDevice

CONDUCTOR = "conductor"
DRAIN_S = 60.0

OnRole = Callable[[str, Role, bool], None]
"""Told the name of a worker and a role: that it is to take it (False), or has taken it (True)."""


class Host:
    """A worker, in one life after the other, or a store, which has one and no device.

    `serve` is the counterpart of `baton.worker.serving.serve` on the in-memory network. `role` and
    `service` are those of the present life, from `begin` on.
    """

    role: Role
    service: Service
    check_integrity: Callable[[], None]

    def __init__(
        self, name: str, network: MemoryNetwork, device: ModelledDevice | None, on_role: OnRole
    ) -> None:
        self.name = name
        self.device = device
        self.signals = StopSignals()
        self.main: asyncio.Task[None] | None = None  # all lives; who starts it sets it
        self.lives = 0
        self._network = network
        self._on_role = on_role

    def begin(self, role: Role, service: Service, check_integrity: Callable[[], None]) -> None:
        """Another life; its services are on the network."""
        self.role, self.service, self.check_integrity = role, service, check_integrity
        self.lives += 1

    def name_life(self) -> str:
        """The incarnation that follows, which is no random number here."""
        return str(self.lives + 1)

    async def serve(self, info: Callable[[str], WorkerInfo], service: Service) -> Role | None:
        """One life; returns the role of the next."""
        registration = info(self.name)
        connect = partial(self._network.fleet_client, self.name)
        member = ConductorSet((CONDUCTOR,), None, connect, registration, service.load)
        role = await live(service, member, self._set_ready, DRAIN_S, self.signals)
        self.check_integrity()
        self._network.kill(self.name)  # the server of this life ends
        await member.aclose()
        return role

    async def _set_ready(self, ready: bool) -> None:
        wanted = self.service.links.wanted_role
        if ready and self.lives > 1:
            self._on_role(self.name, self.role, True)
        elif not ready and wanted is not None:
            self._on_role(self.name, wanted, False)
