"""A transport that moves no bytes: a read takes what its bytes take over links that others use.

Every process is on a node, and its pool is in GPU or CPU memory (a store's). Pools are numbers
only: `PoolMemory` without a buffer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from baton.errors import InternalError, TransportError
from baton.kv.transport.base import Copy, PoolMemory
from baton.kv.transport.transfer import (
    PendingTransfer,
    check_copies,
    refused_endpoint,
    unknown_peer,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pool is."""

    node: str
    host: bool = False  # in CPU memory


class Carrier(Protocol):
    """The links between nodes, and inside of them."""

    async def carry(self, source: Place, reader: Place, nbytes: int) -> None:
        """Return when the bytes have come. Cancelling ends the transfer."""


class Fabric:
    """Who can be reached. Shared by the transports of one datacentre."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.members: dict[bytes, ModelledTransport] = {}


class ModelledTransport:
    """Implements `baton.kv.transport.base.Transport`."""

    name = "modelled"

    def __init__(self, life: str, place: Place, fabric: Fabric) -> None:
        self.place = place
        self.nbytes = 0
        self.bytes_read = 0
        self._key = life.encode()
        self._fabric = fabric
        self._peers: dict[str, ModelledTransport] = {}
        self._tasks: dict[asyncio.Task[None], PendingTransfer] = {}

    async def start(self) -> None:
        self._fabric.members[self._key] = self

    def allocate(self, nbytes: int, device: str = "cpu", backing: Path | None = None) -> PoolMemory:
        if self.nbytes:
            raise InternalError("a transport has one pool, and this one has it already")
        self.nbytes = nbytes
        return PoolMemory(0, nbytes, device, None)

    def endpoint(self) -> bytes:
        return self._key

    async def connect(self, peer: str, endpoint: bytes) -> None:
        source = self._fabric.members.get(endpoint)
        if source is None:
            raise refused_endpoint(peer, self.name, "it is not in this datacentre")
        await self.disconnect(peer)
        self._peers[peer] = source

    async def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)
        await self._cancel([t for t, transfer in self._tasks.items() if transfer.peer == peer])

    def read(self, peer: str, copies: Sequence[Copy]) -> PendingTransfer:
        source = self._peers.get(peer)
        if source is None:
            raise unknown_peer(peer)
        total = check_copies(copies, self.nbytes, source.nbytes, peer)
        task = asyncio.get_running_loop().create_task(self._move(source, total))
        transfer = PendingTransfer(peer, on_stop=_canceller(task))
        self._tasks[task] = transfer
        task.add_done_callback(self._ended)
        return transfer

    def serving(self, peer: str) -> AbstractContextManager[None]:
        return nullcontext()

    async def close(self) -> None:
        self._fabric.members.pop(self._key, None)
        await self._cancel(list(self._tasks))
        self._peers.clear()

    async def _move(self, source: ModelledTransport, nbytes: int) -> None:
        await self._fabric.carrier.carry(source.place, self.place, nbytes)
        self.bytes_read += nbytes

    def _ended(self, task: asyncio.Task[None]) -> None:
        transfer = self._tasks.pop(task)
        if task.cancelled():
            transfer.end(TransportError(f"a read from {transfer.peer} was stopped"))
        elif (error := task.exception()) is not None:
            transfer.end(TransportError(f"read from {transfer.peer} failed: {error}"))
        else:
            transfer.end(None)

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _canceller(task: asyncio.Task[None]) -> Callable[[], None]:
    def cancel() -> None:
        task.cancel()

    return cancel
