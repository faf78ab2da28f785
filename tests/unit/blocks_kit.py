"""Processes that lend, borrow, offer and take blocks, over in-memory streams."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from baton.hashing import KEY_BYTES
from baton.kv.blocks.borrower import Borrower
from baton.kv.blocks.loans import LoanId
from baton.kv.blocks.offer import Offers
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.server import BlocksServer
from baton.kv.blocks.taker import Slot
from baton.kv.digest import Verify
from baton.kv.identity import Identity
from baton.kv.transport.base import PoolMemory, Transport
from baton.kv.transport.loopback import FaultPlan, LoopbackFabric
from baton.kv.transport.registry import make_transport
from baton.kv.transport.shared import SharedTransport
from baton.rpc.memory import FaultPlan as MessagePlan
from baton.rpc.memory import MemoryNetwork
from baton.types.fleet import KvLayout, Peer
from tests.unit.transport_kit import Bytes, view

LAYOUT = KvLayout("0123456789abcdef", "float32", num_layers=4, kv_heads=1, head_dim=8, block_size=4)
BLOCKS = 64  # per pool
TTL = 10.0
OPTIONS = BlocksOptions(lease_ttl_s=TTL, verify=Verify.OFF)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def keys(*numbers: int) -> bytes:
    return b"".join(key(number) for number in numbers)


def contents(number: int, layout: KvLayout = LAYOUT) -> Bytes:
    """Of the block with key `number`, wherever it is."""
    return np.random.default_rng(number).integers(1, 256, layout.block_bytes, dtype=np.uint8)


def split(raw: bytes) -> list[int]:
    found = range(0, len(raw), KEY_BYTES)
    return [int.from_bytes(raw[at : at + KEY_BYTES], "big") for at in found]


@dataclass
class Pool:
    """Implements Source and Sink over some memory. A block whose last loan has ended is reused at
    once when `reuse`: whoever still reads it reads garbage."""

    memory: PoolMemory
    layout: KvLayout = LAYOUT
    run: int = BLOCKS  # blocks that are yielded at a time
    pause_s: float = 0.0  # before each run but the first
    reuse: bool = False
    fails: Exception | None = None  # after the first run
    wants: Callable[[int], bool] = lambda number: True
    reserve_s: float = 0.0
    held: dict[int, int] = field(default_factory=dict)  # number of a key -> block
    loans: dict[LoanId, list[int]] = field(default_factory=dict)
    lent: int = 0  # loans so far
    leases: Counter[int] = field(default_factory=Counter)
    reserved: set[Slot] = field(default_factory=set)
    committed: list[int] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    parents: list[bytes] = field(default_factory=list)  # of what was reserved
    pins: list[tuple[int, float]] = field(default_factory=list)  # that were asked for

    def block(self, number: int) -> Bytes:
        size = self.layout.block_bytes
        return view(self.memory)[number * size : (number + 1) * size]

    def put(self, *numbers: int, first_block: int = 0) -> None:
        """Blocks with these keys, in a row."""
        for place, number in enumerate(numbers, first_block):
            self.held[number] = place
            self.block(place)[:] = contents(number, self.layout)

    async def lend(self, loan: LoanId, keys: bytes) -> AsyncGenerator[tuple[int, ...], None]:
        assert loan not in self.loans
        held = self.loans[loan] = []
        self.lent += 1
        numbers = split(keys)
        for at in range(0, len(numbers), self.run):
            if at:
                await asyncio.sleep(self.pause_s)
                if self.fails is not None:
                    raise self.fails
            run = list(itertools.takewhile(self.held.__contains__, numbers[at : at + self.run]))
            blocks = [self.held[number] for number in run]
            held += blocks
            self.leases.update(blocks)
            yield tuple(blocks)
            if len(run) < self.run:
                return

    def end(self, loan: LoanId) -> None:
        ended = self.loans.pop(loan)
        self.leases.subtract(ended)
        for block in ended:
            if self.reuse and not self.leases[block]:
                self.held = {n: b for n, b in self.held.items() if b != block}
                self.block(block)[:] = 0

    async def reserve(
        self, keys: bytes, depth: int, parent: bytes, pin_s: float | None
    ) -> Sequence[Slot]:
        self.parents.append(parent)
        if pin_s is not None:
            self.pins += [(number, pin_s) for number in split(keys)]
        await asyncio.sleep(self.reserve_s)
        taken = set(self.held.values()) | {slot.block for slot in self.reserved}
        free = (block for block in range(BLOCKS) if block not in taken)
        slots = [
            Slot(key(number), index, next(free))
            for index, number in enumerate(split(keys))
            if number not in self.held and self.wants(number)
        ]
        self.reserved |= set(slots)
        return slots

    def commit(self, slot: Slot) -> None:
        self.reserved.remove(slot)
        (number,) = split(slot.key)
        assert np.array_equal(self.block(slot.block), contents(number, self.layout))
        self.held[number] = slot.block
        self.committed.append(number)

    def abort(self, slot: Slot) -> None:
        self.reserved.remove(slot)
        self.block(slot.block)[:] = 0xEE  # somebody else's from here on
        self.aborted.append(split(slot.key)[0])

    def check_even(self) -> None:
        """Nothing is lent, reserved or leased."""
        assert not self.loans
        assert not self.reserved
        assert not +self.leases


@dataclass
class Side:
    """One process."""

    name: str
    peer: Peer
    identity: Identity
    transport: Transport
    shared: SharedTransport
    pool: Pool
    server: BlocksServer
    borrower: Borrower
    options: BlocksOptions

    async def borrow(
        self,
        source: Side,
        wanted: Sequence[int],
        place: Sequence[int] | None = None,
        timeout_s: float = 60.0,
        **more: object,
    ) -> int:
        """As Borrower.borrow, and checks what came."""
        place = list(place if place is not None else range(len(wanted)))
        count = await self.borrower.borrow(
            source.peer,
            keys(*wanted),
            place,
            timeout_s=timeout_s,
            **more,  # type: ignore[arg-type]
        )
        for number, block in zip(wanted[:count], place, strict=False):
            expected = contents(number, self.identity.layout)
            assert np.array_equal(self.pool.block(block), expected), number
        return count


@dataclass
class World:
    network: MemoryNetwork
    fabric: LoopbackFabric
    tasks: asyncio.TaskGroup
    options: BlocksOptions
    kind: str
    layout: KvLayout
    sides: list[Side] = field(default_factory=list)
    running: list[asyncio.Task[None]] = field(default_factory=list)

    async def side(
        self,
        name: str,
        *,
        takes: bool = False,
        layout: KvLayout | None = None,
        incarnation: str = "life1",
        **changes: object,
    ) -> Side:
        identity = Identity(name, incarnation, layout or self.layout)
        transport = make_transport(self.kind, f"{name}/{incarnation}", fabric=self.fabric)
        await transport.start()
        size = BLOCKS * identity.layout.block_bytes
        memory = (
            await asyncio.to_thread(transport.allocate, size)
            if self.kind != "loopback"
            else (transport.allocate(size))
        )
        pool = Pool(memory, identity.layout)
        shared = SharedTransport(transport)
        options = replace(self.options, **changes)  # type: ignore[arg-type]
        server = BlocksServer(identity, shared, memory, pool, pool if takes else None, options)
        dialer = self.network.blocks_dialer(name)
        borrower = Borrower(identity, shared, memory, dialer, options)
        self.running.append(self.tasks.create_task(borrower.run()))
        await asyncio.sleep(0)
        peer = Peer(name, incarnation, f"{name}:1")
        self.network.add_blocks(peer.address, server)
        side = Side(name, peer, identity, transport, shared, pool, server, borrower, options)
        self.sides.append(side)
        return side

    def offers(self, side: Side, store: Peer) -> Offers:
        offers = Offers(
            store,
            side.identity,
            side.shared,
            side.pool.memory,
            self.network.blocks_dialer(side.name),
            side.pool,
            side.options,
        )
        self.running.append(self.tasks.create_task(offers.run()))
        return offers


@asynccontextmanager
async def world(
    plan: FaultPlan | None = None,
    messages: MessagePlan | None = None,
    options: BlocksOptions = OPTIONS,
    kind: str = "loopback",
    layout: KvLayout = LAYOUT,
) -> AsyncIterator[World]:
    """Nothing is lent, reserved or connected when the block has ended."""
    fabric = LoopbackFabric(plan)
    tasks = asyncio.TaskGroup()
    sides: list[Side] = []
    try:
        async with tasks, MemoryNetwork(messages) as network:
            made = World(network, fabric, tasks, options, kind, layout, sides)
            yield made
            for task in made.running:
                task.cancel()
            await asyncio.wait(made.running)
    finally:
        for side in sides:
            await side.transport.close()
    for side in sides:
        side.pool.check_even()
        assert not side.shared._connections


class Plan:
    """Every read meets the same fault."""

    def __init__(self, **fault: object) -> None:
        from baton.kv.transport.loopback import Fault

        self.fault = Fault(**fault)  # type: ignore[arg-type]

    def on_read(self, reader: str, source: str, nbytes: int) -> object:
        return self.fault
