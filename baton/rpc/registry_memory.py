"""The registry in memory, for processes that share an event loop. Faults come from a plan."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from baton.errors import RegistryUnavailable
from baton.rpc.memory import FaultPlan, NoFaults
from baton.rpc.pipe import Clock
from baton.types.registry import ConductorInfo, RequestRecord

Value = TypeVar("Value")
Result = TypeVar("Result")

CALL_TIMEOUT_S = 1.0
ADDRESS = "registry"  # what fault plans know it by


class _Leases(Generic[Value]):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: dict[str, tuple[float, Value]] = {}

    def put(self, key: str, value: Value, ttl_s: float) -> None:
        self._entries[key] = (self._clock() + ttl_s, value)

    def live(self) -> dict[str, Value]:
        now = self._clock()
        self._entries = {key: entry for key, entry in self._entries.items() if entry[0] > now}
        return {key: value for key, (_, value) in self._entries.items()}

    def drop(self, key: str) -> None:
        self._entries.pop(key, None)


class RegistryServer:
    """What all of them share. `down` is an outage; `wipe` is a restart that forgot everything.
    `clock` is its own, where the processes have clocks that differ."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.down = False
        self._clock = clock or _now
        self.wipe()

    def wipe(self) -> None:
        self.leases: _Leases[ConductorInfo] = _Leases(self._clock)
        self.requests: _Leases[RequestRecord] = _Leases(self._clock)


class MemoryRegistry:
    """Implements Registry for `caller`."""

    def __init__(self, server: RegistryServer, caller: str, plan: FaultPlan | None = None) -> None:
        self._server = server
        self._caller = caller
        self._plan = plan or NoFaults()

    async def announce(self, info: ConductorInfo, ttl_s: float) -> bool:
        def act(server: RegistryServer) -> bool:
            known = info.incarnation in server.leases.live()
            server.leases.put(info.incarnation, info, ttl_s)
            return known

        return await self._call("announce", act)

    async def withdraw(self, incarnation: str) -> None:
        await self._call("withdraw", lambda s: s.leases.drop(incarnation))

    async def conductors(self) -> tuple[ConductorInfo, ...]:
        infos = await self._call("conductors", lambda s: s.leases.live().values())
        return tuple(sorted(infos, key=lambda info: (info.name, info.incarnation)))

    async def note_request(self, key: str, record: RequestRecord, ttl_s: float) -> None:
        await self._call("note_request", lambda s: s.requests.put(key, record, ttl_s))

    async def find_request(self, key: str) -> RequestRecord | None:
        return await self._call("find_request", lambda s: s.requests.live().get(key))

    async def aclose(self) -> None:
        """Nothing to free."""

    async def _call(self, method: str, act: Callable[[RegistryServer], Result]) -> Result:
        fault = self._plan.on_call(self._caller, ADDRESS, method)
        await asyncio.sleep(min(fault.delay_s, CALL_TIMEOUT_S))
        if self._server.down or fault.lose or fault.delay_s > CALL_TIMEOUT_S:
            raise RegistryUnavailable("the registry cannot be reached")
        result = act(self._server)
        if fault.lose_answer:
            raise RegistryUnavailable("the answer of the registry was lost")
        return result


def _now() -> float:
    return asyncio.get_running_loop().time()
