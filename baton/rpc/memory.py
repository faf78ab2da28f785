"""The services in one process: pairs of Duplex ends and dialers that call services directly.

A fault plan decides what happens to every message and call, so that the simulator and the fault
harness see what a network does: delay, loss of the connection, a lost answer. Streams never
reorder, repeat or drop single messages (gRPC does not either): they are late, or they break.
All time is loop time, so a virtual-time loop needs no change here. What a service does runs in the
context in which it was added, so that a loop can tell whose work it is.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from baton.errors import PeerGone
from baton.rpc.pipe import Clock, Pipe
from baton.rpc.services import (
    BlocksService,
    Duplex,
    FleetService,
    HandoffService,
    WorkerService,
)
from baton.types.blocks import BlocksMessage
from baton.types.fleet import FleetLease, WorkerInfo, WorkerLoad
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.link import ConductorMessage, WorkerMessage

Out = TypeVar("Out")
In = TypeVar("In")
Result = TypeVar("Result")

CAPACITY = 64
WIND_UP_S = 10.0  # how long services may clean up when the network is closed


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one message or call.

    `delay_s` comes first. `lose` breaks the stream instead of delivering the message, or makes the
    call fail without reaching the service. `lose_answer` (calls only) fails it after the service
    has acted. `skip` (messages only) loses this one alone: no stream does that, but whoever
    numbers messages must notice.
    """

    delay_s: float = 0.0
    lose: bool = False
    lose_answer: bool = False
    skip: bool = False


NO_FAULT = Fault()


class FaultPlan(Protocol):
    def on_message(self, sender: str, receiver: str, message: object) -> Fault:
        """Asked once for every message that is sent, in order."""

    def on_call(self, caller: str, callee: str, method: str) -> Fault:
        """Asked once for every dial and unary call."""


class NoFaults:
    """The plan of a network that works."""

    def on_message(self, sender: str, receiver: str, message: object) -> Fault:
        return NO_FAULT

    def on_call(self, caller: str, callee: str, method: str) -> Fault:
        return NO_FAULT


class MemoryDuplex(Generic[Out, In]):
    """One end of an in-memory stream. Make both with `duplex_pair`."""

    def __init__(
        self,
        here: str,
        there: str,
        out: Pipe[Out],
        into: Pipe[In],
        plan: FaultPlan,
    ) -> None:
        self._here = here
        self._there = there
        self._out = out
        self._into = into
        self._plan = plan

    async def send(self, message: Out) -> None:
        fault = self._plan.on_message(self._here, self._there, message)
        if fault.lose:
            self.cut(f"the stream between {self._here} and {self._there} broke")
        if not fault.skip:
            await self._out.put(message, fault.delay_s)

    async def receive(self) -> In:
        return await self._into.get()

    async def aclose(self) -> None:
        self._into.end(f"the stream to {self._there} was closed here", discard=True)
        self._out.end(f"{self._here} ended the stream")

    def cut(self, reason: str) -> None:
        """Break the stream for both ends, as a lost connection does: with what is under way."""
        self._into.end(reason, cut=True)
        self._out.end(reason, cut=True)


def duplex_pair(
    dialer: str, server: str, plan: FaultPlan | None = None, clock: Clock | None = None
) -> tuple[MemoryDuplex[Out, In], MemoryDuplex[In, Out]]:
    """Both ends of a new stream: the dialer's, the server's."""
    there: Pipe[Out] = Pipe(CAPACITY, clock)
    back: Pipe[In] = Pipe(CAPACITY, clock)
    plan = plan or NoFaults()
    return (
        MemoryDuplex(dialer, server, there, back, plan),
        MemoryDuplex(server, dialer, back, there, plan),
    )


@dataclass(frozen=True, slots=True)
class _Stream:
    ends: tuple[str, str]  # addresses
    cut: Callable[[str], None]


class MemoryNetwork:
    """Addresses and the services behind them, for processes that share an event loop.

    Use it as an async context manager: leaving it ends every stream and awaits every service.
    `clock` is the network's own, where the processes have clocks that differ.
    """

    def __init__(self, plan: FaultPlan | None = None, clock: Clock | None = None) -> None:
        self.plan = plan or NoFaults()
        self._clock = clock
        self._workers: dict[str, WorkerService] = {}
        self._handoffs: dict[str, HandoffService] = {}
        self._blocks: dict[str, BlocksService] = {}
        self._fleets: dict[str, FleetService] = {}
        self._homes: dict[str, contextvars.Context] = {}
        self._calls: set[asyncio.Task[Any]] = set()
        self._streams: dict[asyncio.Task[None], _Stream] = {}
        self._at: dict[str, dict[asyncio.Task[None], _Stream]] = {}  # the same, by address

    async def __aenter__(self) -> MemoryNetwork:
        return self

    async def __aexit__(self, *_: object) -> None:
        _cut(self._streams, "the network was closed")
        await _wind_up(set(self._streams))

    def add_worker(self, address: str, service: WorkerService) -> None:
        self._workers[address] = service
        self._homes[address] = contextvars.copy_context()

    def add_handoff(self, address: str, service: HandoffService) -> None:
        self._handoffs[address] = service
        self._homes[address] = contextvars.copy_context()

    def add_blocks(self, address: str, service: BlocksService) -> None:
        self._blocks[address] = service
        self._homes[address] = contextvars.copy_context()

    def add_fleet(self, address: str, service: FleetService) -> None:
        self._fleets[address] = service
        self._homes[address] = contextvars.copy_context()

    def kill(self, address: str) -> None:
        """What SIGKILL of the process at `address` does to everybody else."""
        for services in (self._workers, self._handoffs, self._blocks, self._fleets):
            services.pop(address, None)
        _cut(self._at.get(address, {}), f"{address} is gone")

    def cut(self, one: str, other: str) -> None:
        """Break every stream between two addresses, as a lost connection does."""
        reason = f"the connection between {one} and {other} was lost"
        ends = {one, other}
        between = {t: s for t, s in self._at.get(one, {}).items() if set(s.ends) == ends}
        _cut(between, reason)

    def worker_dialer(self, caller: str) -> MemoryWorkerDialer:
        return MemoryWorkerDialer(self, caller)

    def handoff_dialer(self, caller: str) -> MemoryHandoffDialer:
        return MemoryHandoffDialer(self, caller)

    def blocks_dialer(self, caller: str) -> MemoryBlocksDialer:
        return MemoryBlocksDialer(self, caller)

    def fleet_client(self, caller: str, address: str, timeout_s: float = 5.0) -> MemoryFleetClient:
        return MemoryFleetClient(self, caller, address, timeout_s)

    async def dial_worker(
        self, caller: str, address: str, timeout_s: float
    ) -> Duplex[ConductorMessage, WorkerMessage]:
        await self._reach(caller, address, "link", timeout_s)
        service = self._workers.get(address)
        if service is None:
            raise _unreachable(address)
        near: MemoryDuplex[ConductorMessage, WorkerMessage]
        near, far = duplex_pair(caller, address, self.plan, self._clock)
        self._serve(caller, address, service.link(far), far.aclose, far.cut)
        return near

    async def dial_handoff(
        self, caller: str, address: str, timeout_s: float
    ) -> Duplex[DecodeMessage, PrefillMessage]:
        await self._reach(caller, address, "pair", timeout_s)
        service = self._handoffs.get(address)
        if service is None:
            raise _unreachable(address)
        near: MemoryDuplex[DecodeMessage, PrefillMessage]
        near, far = duplex_pair(caller, address, self.plan, self._clock)
        self._serve(caller, address, service.pair(far), far.aclose, far.cut)
        return near

    async def dial_blocks(
        self, caller: str, address: str, timeout_s: float
    ) -> Duplex[BlocksMessage, BlocksMessage]:
        await self._reach(caller, address, "blocks", timeout_s)
        service = self._blocks.get(address)
        if service is None:
            raise _unreachable(address)
        near: MemoryDuplex[BlocksMessage, BlocksMessage]
        near, far = duplex_pair(caller, address, self.plan, self._clock)
        self._serve(caller, address, service.pair(far), far.aclose, far.cut)
        return near

    async def call_fleet(
        self,
        caller: str,
        address: str,
        method: str,
        timeout_s: float,
        call: Callable[[FleetService], Awaitable[Result]],
    ) -> Result:
        fault = await self._reach(caller, address, method, timeout_s)
        service = self._fleets.get(address)
        if service is None:
            raise _unreachable(address)
        # Not awaited to its end: a caller's patience does not depend on the callee.
        answer = asyncio.create_task(_call(call, service), context=self._homes[address])
        self._calls.add(answer)
        answer.add_done_callback(self._calls.discard)
        try:
            await asyncio.wait([answer], timeout=timeout_s)
        finally:
            answer.cancel()
        if not answer.done():
            raise PeerGone(f"{address} did not answer {method} in time")
        result = answer.result()
        if fault.lose_answer:
            raise PeerGone(f"the answer of {address} to {method} was lost")
        return result

    async def _reach(self, caller: str, address: str, method: str, timeout_s: float) -> Fault:
        fault = self.plan.on_call(caller, address, method)
        await asyncio.sleep(min(fault.delay_s, timeout_s))
        if fault.lose or fault.delay_s > timeout_s:
            raise _unreachable(address)
        return fault

    def _serve(
        self,
        caller: str,
        address: str,
        service: Awaitable[None],
        aclose: Callable[[], Awaitable[None]],
        cut: Callable[[str], None],
    ) -> None:
        async def run() -> None:
            try:
                await service
            finally:
                await aclose()

        name = f"serve {caller} at {address}"
        task = asyncio.create_task(run(), name=name, context=self._homes[address])
        stream = self._streams[task] = _Stream((caller, address), cut)
        for end in stream.ends:
            self._at.setdefault(end, {})[task] = stream
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        for end in dict.fromkeys(self._streams.pop(task).ends):
            del self._at[end][task]


class MemoryWorkerDialer:
    def __init__(self, network: MemoryNetwork, caller: str) -> None:
        self._network = network
        self._caller = caller

    async def link(self, address: str, timeout_s: float) -> Duplex[ConductorMessage, WorkerMessage]:
        return await self._network.dial_worker(self._caller, address, timeout_s)


class MemoryHandoffDialer:
    def __init__(self, network: MemoryNetwork, caller: str) -> None:
        self._network = network
        self._caller = caller

    async def pair(self, address: str, timeout_s: float) -> Duplex[DecodeMessage, PrefillMessage]:
        return await self._network.dial_handoff(self._caller, address, timeout_s)


class MemoryBlocksDialer:
    def __init__(self, network: MemoryNetwork, caller: str) -> None:
        self._network = network
        self._caller = caller

    async def pair(self, address: str, timeout_s: float) -> Duplex[BlocksMessage, BlocksMessage]:
        return await self._network.dial_blocks(self._caller, address, timeout_s)


class MemoryFleetClient:
    def __init__(self, network: MemoryNetwork, caller: str, address: str, timeout_s: float) -> None:
        self._network = network
        self._caller = caller
        self._address = address
        self._timeout_s = timeout_s

    async def register(self, info: WorkerInfo) -> FleetLease:
        return await self._call("register", lambda fleet: fleet.register(info))

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        return await self._call("renew", lambda fleet: fleet.renew(name, incarnation, load))

    async def leave(self, name: str, incarnation: str) -> None:
        await self._call("leave", lambda fleet: fleet.leave(name, incarnation))

    async def aclose(self) -> None:
        """Nothing to free here; the gRPC client has a channel."""

    async def _call(self, method: str, call: Callable[[FleetService], Awaitable[Result]]) -> Result:
        return await self._network.call_fleet(
            self._caller, self._address, method, self._timeout_s, call
        )


def _cut(streams: Mapping[asyncio.Task[None], _Stream], reason: str) -> None:
    for stream in streams.values():
        stream.cut(reason)


async def _call(call: Callable[[FleetService], Awaitable[Result]], service: FleetService) -> Result:
    return await call(service)


async def _wind_up(tasks: set[asyncio.Task[None]]) -> None:
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=WIND_UP_S)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)


def _unreachable(address: str) -> PeerGone:
    return PeerGone(f"{address} cannot be reached")
