"""The conductors that a worker or store is registered with: one `Membership` for each.

Some are told by flags and stay; others come and go in the registry. While that is away, the ones
that are known stay known.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from baton.errors import BatonError, RegistryUnavailable
from baton.rpc.membership import REFUSALS, Membership
from baton.rpc.registry import Registry
from baton.rpc.services import FleetService
from baton.types.fleet import WorkerInfo, WorkerLoad

log = logging.getLogger(__name__)

LOOK_S = 1.0  # how often the registry is asked who is there
REFUSED_RETRY_S = 30.0  # a conductor that refused us may have a fleet that we fit, later


class FleetClient(FleetService, Protocol):
    async def aclose(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Conductor:
    address: str
    client: FleetClient
    membership: Membership
    task: asyncio.Task[None] | None = None
    refusal: BatonError | None = None
    lives: set[str] = field(default_factory=set)  # incarnations that were announced last


class ConductorSet:
    """To be used as one `Membership`: registered when at least one conductor has accepted.

    `connect` makes the client for an address. Call `aclose` at the end.
    """

    def __init__(
        self,
        addresses: Iterable[str],
        registry: Registry | None,
        connect: Callable[[str], FleetClient],
        info: WorkerInfo,
        load: Callable[[], WorkerLoad],
    ) -> None:
        self._told = frozenset(addresses)
        self._registry = registry
        self._connect = connect
        self._info = info
        self._load = load
        self._known: dict[str, _Conductor] = {}
        self._leaving = False
        self.registered = asyncio.Event()

    @property
    def addresses(self) -> frozenset[str]:
        """Of those that are known now."""
        return frozenset(self._known)

    async def run(self) -> None:
        """Until cancelled. Raises a group with REFUSALS when every known conductor refuses this
        worker."""
        async with asyncio.TaskGroup() as group:
            for address in sorted(self._told):
                self._meet(group, address)
            if self._registry is None:
                return  # when the group's tasks have ended: nobody comes or goes
            while True:
                if not self._leaving:
                    await self._look(group, self._registry)
                await asyncio.sleep(LOOK_S)

    async def leave(self) -> None:
        """Tell all conductors that this worker goes: see `Membership.leave`."""
        self._leaving = True
        known = tuple(self._known.values())
        for conductor in known:
            if conductor.task is not None and not conductor.membership.registered.is_set():
                conductor.task.cancel()
        await asyncio.gather(*(conductor.membership.leave() for conductor in known))

    async def aclose(self) -> None:
        """Close the connections. After `run` has ended."""
        await asyncio.gather(*(conductor.client.aclose() for conductor in self._known.values()))

    async def _look(self, group: asyncio.TaskGroup, registry: Registry) -> None:
        """Meet who is new, also at a known address; forget who is neither announced nor answers."""
        try:
            infos = await registry.conductors()
        except RegistryUnavailable:
            return
        if self._leaving:
            return
        announced: dict[str, set[str]] = {}
        for info in infos:
            announced.setdefault(info.grpc, set()).add(info.incarnation)
        for address in sorted(announced.keys() - self._known.keys()):
            self._meet(group, address)
        for address, lives in announced.items():
            known = self._known[address]
            if known.lives and lives - known.lives:
                known.membership.renew_now()
            known.lives = lives
        for address in sorted(self._known.keys() - announced.keys() - self._told):
            if not self._known[address].membership.registered.is_set():
                await self._forget(address)

    def _meet(self, group: asyncio.TaskGroup, address: str) -> None:
        client = self._connect(address)
        membership = Membership(client, self._info, self._load, self._on_change)
        conductor = self._known[address] = _Conductor(address, client, membership)
        conductor.task = group.create_task(self._keep(conductor), name=f"member of {address}")

    async def _forget(self, address: str) -> None:
        log.info("the conductor at %s is gone", address)
        conductor = self._known.pop(address)
        assert conductor.task is not None
        conductor.task.cancel()
        await asyncio.wait([conductor.task])
        await conductor.client.aclose()

    async def _keep(self, conductor: _Conductor) -> None:
        """Stay registered with it. Raises its refusal when there is no other that accepts us."""
        while not self._leaving:
            conductor.refusal = None
            try:
                await conductor.membership.run()
            except REFUSALS as error:
                conductor.refusal = error
                log.error("the conductor at %s refuses us: %s", conductor.address, error.message)
                if all(each.refusal is not None for each in self._known.values()):
                    log.error("no conductor that is known accepts this process: it ends")
                    raise
                await asyncio.sleep(REFUSED_RETRY_S)

    def _on_change(self) -> None:
        if any(each.membership.registered.is_set() for each in self._known.values()):
            self.registered.set()
        else:
            self.registered.clear()
