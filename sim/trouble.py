"""The faults of a plan, done to a cluster."""

from __future__ import annotations

import asyncio

from baton.rpc.registry_memory import ADDRESS as REGISTRY
from sim.cluster import Cluster
from sim.log import EventLog
from sim.loop import SimLoop
from sim.network import KEEPALIVE_S
from sim.plan import CONDUCTOR, Fault, FaultKind
from sim.process import Condition


class Trouble:
    """`halted_s`: how long the first conductor stood still."""

    def __init__(self, cluster: Cluster, loop: SimLoop, log: EventLog) -> None:
        self.halted_s = 0.0
        self._cluster = cluster
        self._network = cluster.network
        self._loop = loop
        self._log = log

    async def suffer(self, fault: Fault) -> None:
        """From its beginning to its end."""
        await asyncio.sleep(fault.at)
        lasts_s = max(0.0, fault.until - fault.at)
        until = self._loop.now + lasts_s
        network = self._network
        match fault.kind:
            case FaultKind.KILL | FaultKind.STOP if fault.a == REGISTRY:
                await self._lose_registry(fault, until)
                return
            case FaultKind.KILL:
                await self._kill(fault, until)
                return
            case FaultKind.STOP:
                await self._stop(fault, until)
                return
            case FaultKind.PARTITION:
                network.block(fault.a, fault.b, until)
                network.block(fault.b, fault.a, until)
            case FaultKind.ONE_WAY:
                network.block(fault.a, fault.b, until)
            case FaultKind.BREAK:
                network.services.cut(fault.a, fault.b)
                lasts_s = 0.0
            case FaultKind.SLOW:
                network.slow(fault.a, until)
        self._note(fault, lasts_s)
        await asyncio.sleep(lasts_s)

    def _note(self, fault: Fault, lasts_s: float) -> None:
        self._log.note("FAULT", str(fault))
        who = f"{fault.a} - {fault.b}" if fault.b else fault.a
        self._network.note(fault.kind, who, lasts_s)

    async def _kill(self, fault: Fault, until: float) -> None:
        process = self._cluster.process(fault.a)
        if process is None:
            return

        def kill() -> None:
            if process.condition is not Condition.DEAD:
                self._note(fault, max(until - self._loop.now, 0.0))
                self._cluster.kill(fault.a)

        process.light_fuse(fault.after_steps, kill)
        await asyncio.sleep(max(0.05, until - self._loop.now))
        kill()
        await self._cluster.start(fault.a)

    async def _stop(self, fault: Fault, until: float) -> None:
        process = self._cluster.process(fault.a)
        if process is None:
            return

        def stop() -> None:
            lasts_s = until - self._loop.now
            if process.condition is not Condition.RUNNING or lasts_s <= 0:
                return
            if fault.a == CONDUCTOR:
                self.halted_s += lasts_s
            self._note(fault, lasts_s)
            process.stop()
            self._network.stopped(fault.a, until)
            if lasts_s > KEEPALIVE_S:
                self._loop.call_later(KEEPALIVE_S, self._cut_off, process.name)

        process.light_fuse(fault.after_steps, stop)
        await asyncio.sleep(until - self._loop.now)
        process.go_on()

    def _cut_off(self, name: str) -> None:
        for other in self._cluster.processes():
            if other.name != name:
                self._network.services.cut(name, other.name)

    async def _lose_registry(self, fault: Fault, until: float) -> None:
        """Killed, it comes back empty; stopped, nobody hears from it."""
        registry = self._cluster.registry
        assert registry is not None
        self._note(fault, until - self._loop.now)
        if fault.kind is FaultKind.STOP:
            self._network.stopped(REGISTRY, until)
            await asyncio.sleep(until - self._loop.now)
            return
        registry.down = True
        registry.wipe()
        await asyncio.sleep(until - self._loop.now)
        registry.down = False
