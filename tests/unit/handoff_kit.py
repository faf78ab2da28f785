"""A prefill side and decode sides over in-memory streams and the loopback transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from baton.kv.digest import Verify
from baton.kv.handoff.leases import Ending
from baton.kv.handoff.options import HandoffOptions
from baton.kv.handoff.publisher import HandoffPublisher
from baton.kv.handoff.reader import Fetched, HandoffReader, Place
from baton.kv.identity import Identity
from baton.kv.layout import byte_range
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.loopback import Fault, FaultPlan, LoopbackFabric, LoopbackTransport
from baton.rpc.memory import MemoryNetwork
from baton.rpc.services import Duplex
from baton.types.fleet import KvLayout, Peer
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.request import AttemptId, SampledToken
from tests.unit.transport_kit import Bytes, pattern, view

LAYOUT = KvLayout("0123456789abcdef", "float32", num_layers=4, kv_heads=1, head_dim=8, block_size=4)
BLOCKS = 32  # per pool
TTL = 10.0
FIRST = SampledToken(42, 0)
OPTIONS = HandoffOptions(lease_ttl_s=TTL, verify=Verify.FULL)


@dataclass
class PrefillSide:
    publisher: HandoffPublisher
    pool: Bytes
    address: str
    peer: Peer
    released: list[AttemptId] = field(default_factory=list)
    endings: list[tuple[AttemptId, Ending]] = field(default_factory=list)

    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        await self.publisher.serve(stream)

    def publish(
        self,
        attempt: AttemptId,
        blocks: tuple[int, ...],
        layers: Iterable[tuple[int, int]] = ((0, 4),),
        first_block: int = 0,
    ) -> None:
        for begin, end in layers:
            self.publisher.publish(attempt, first_block, blocks, begin, end)

    def block(self, number: int) -> Bytes:
        offset, length = byte_range(LAYOUT, number, 0, LAYOUT.num_layers)
        return self.pool[offset : offset + length]


@dataclass
class DecodeSide:
    reader: HandoffReader
    transport: LoopbackTransport
    pool: Bytes
    quarantined: list[AttemptId] = field(default_factory=list)
    idle: list[AttemptId] = field(default_factory=list)

    async def fetch(
        self,
        attempt: AttemptId,
        peer: Peer,
        blocks: tuple[int, ...],
        timeout_s: float = 60.0,
        reserve_s: float = 0.0,
        cached: int = 0,
    ) -> Fetched:
        async def reserve() -> Place:
            await asyncio.sleep(reserve_s)
            return Place(blocks, cached)

        return await self.reader.fetch(attempt, peer, reserve, timeout_s)

    def block(self, number: int) -> Bytes:
        offset, length = byte_range(LAYOUT, number, 0, LAYOUT.num_layers)
        return self.pool[offset : offset + length]


@dataclass
class Cluster:
    network: MemoryNetwork
    fabric: LoopbackFabric
    tasks: asyncio.TaskGroup
    options: HandoffOptions
    prefills: list[PrefillSide] = field(default_factory=list)
    running: list[asyncio.Task[None]] = field(default_factory=list)

    async def prefill(
        self, name: str = "p0", incarnation: str = "life1", layout: KvLayout = LAYOUT
    ) -> PrefillSide:
        transport, memory = await self._transport(name)
        view(memory)[:] = pattern(memory.nbytes, len(self.fabric.members))
        released: list[AttemptId] = []
        endings: list[tuple[AttemptId, Ending]] = []
        publisher = HandoffPublisher(
            Identity(name, incarnation, layout),
            transport,
            memory,
            released.append,
            lambda attempt, how: endings.append((attempt, how)),
            self.options,
        )
        self.running.append(self.tasks.create_task(publisher.run()))
        address = f"{name}:1"
        side = PrefillSide(
            publisher, view(memory), address, Peer(name, incarnation, address), released, endings
        )
        self.network.add_handoff(address, side)
        self.prefills.append(side)
        return side

    async def decode(self, name: str = "d0", layout: KvLayout = LAYOUT) -> DecodeSide:
        transport, memory = await self._transport(name)
        quarantined: list[AttemptId] = []
        idle: list[AttemptId] = []
        reader = HandoffReader(
            Identity(name, "life1", layout),
            transport,
            memory,
            self.network.handoff_dialer(name),
            quarantined.append,
            idle.append,
            self.options,
        )
        self.running.append(self.tasks.create_task(reader.run()))
        await asyncio.sleep(0)
        return DecodeSide(reader, transport, view(memory), quarantined, idle)

    async def _transport(self, name: str) -> tuple[LoopbackTransport, PoolMemory]:
        transport = LoopbackTransport(name, self.fabric)
        await transport.start()
        return transport, transport.allocate(BLOCKS * LAYOUT.block_bytes)


@asynccontextmanager
async def cluster(
    plan: FaultPlan | None = None, options: HandoffOptions = OPTIONS
) -> AsyncIterator[Cluster]:
    """Everything is checked when the block ends: leases and streams agree."""
    fabric = LoopbackFabric(plan)
    tasks = asyncio.TaskGroup()
    async with tasks, MemoryNetwork() as network:
        made = Cluster(network, fabric, tasks, options)
        yield made
        for side in made.prefills:
            side.publisher.check_integrity()
        for task in made.running:  # the workers' own tasks run until cancelled
            task.cancel()
    for transport in list(fabric.members.values()):
        await transport.close()


class Plan:
    """Every read meets the same fault."""

    def __init__(self, **fault: object) -> None:
        self.fault = Fault(**fault)  # type: ignore[arg-type]

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        return self.fault


def same(local: Bytes, remote: Bytes) -> bool:
    return bool(np.array_equal(local, remote))
