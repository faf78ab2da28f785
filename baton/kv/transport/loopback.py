"""Transport inside one process, driven only by the event loop: tests, simulator, faults.

Time passes through `asyncio.sleep`, so it runs under a virtual-time loop. It behaves like the
strictest of the real ones: nothing moves until the source is `serving`, and an aborted transfer
goes on writing until its time is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import numpy as np

from baton.errors import InternalError, TransportError
from baton.kv.transport.base import Copy, PoolMemory
from baton.kv.transport.memory import Bytes, make_pool, require_cpu
from baton.kv.transport.transfer import (
    PendingTransfer,
    check_copies,
    refused_endpoint,
    unknown_peer,
)


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one read. The default: it succeeds at once."""

    delay_s: float = 0.0
    error: str | None = None  # fails with this message after the delay, half of the bytes written
    corrupt: bool = False  # one byte arrives changed
    hang: bool = False  # never ends until the peer is disconnected


class FaultPlan(Protocol):
    def on_read(self, reader: str, source: str, nbytes: int) -> Fault: ...


class LoopbackFabric:
    """Who can be reached. Shared by the transports of one simulated cluster."""

    def __init__(self, plan: FaultPlan | None = None) -> None:
        self.plan = plan
        self.members: dict[bytes, LoopbackTransport] = {}


class LoopbackTransport:
    name = "loopback"

    def __init__(self, worker: str, fabric: LoopbackFabric) -> None:
        self._worker = worker
        self._fabric = fabric
        self._key = f"{worker}/{uuid4().hex}".encode()
        self._pool: Bytes | None = None
        self._peers: dict[str, LoopbackTransport] = {}
        self._tasks: dict[asyncio.Task[None], PendingTransfer] = {}
        self._served = 0
        self._progress = asyncio.Event()

    async def start(self) -> None:
        self._fabric.members[self._key] = self

    def allocate(self, nbytes: int, device: str = "cpu", backing: Path | None = None) -> PoolMemory:
        require_cpu(self.name, device)
        if self._pool is not None:
            raise InternalError("a transport has one pool, and this one has it already")
        memory = make_pool(nbytes, device, backing)
        self._pool = np.frombuffer(memory.buffer, dtype=np.uint8)  # type: ignore[call-overload]
        return memory

    def endpoint(self) -> bytes:
        return self._key

    async def connect(self, peer: str, endpoint: bytes) -> None:
        source = self._fabric.members.get(endpoint)
        if source is None:
            raise refused_endpoint(peer, self.name, "it is not in this process")
        await self.disconnect(peer)
        self._peers[peer] = source

    async def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)
        await self._cancel([t for t, transfer in self._tasks.items() if transfer.peer == peer])

    def read(self, peer: str, copies: Sequence[Copy]) -> PendingTransfer:
        source = self._peers.get(peer)
        if source is None:
            raise unknown_peer(peer)
        local, remote = _pool_bytes(self._pool), _pool_bytes(source._pool)
        total = check_copies(copies, local, remote, peer)
        transfer = PendingTransfer(peer)
        plan = self._fabric.plan
        fault = plan.on_read(self._worker, peer, total) if plan is not None else Fault()
        task = asyncio.get_running_loop().create_task(
            self._move(transfer, source, tuple(copies), fault), name=f"loopback read from {peer}"
        )
        self._tasks[task] = transfer
        task.add_done_callback(self._forget)
        return transfer

    @contextmanager
    def serving(self, peer: str) -> Iterator[None]:
        self._served += 1
        self._progress.set()
        try:
            yield
        finally:
            self._served -= 1
            if not self._served:
                self._progress.clear()

    async def close(self) -> None:
        self.vanish()
        await self._cancel(list(self._tasks))
        self._peers.clear()

    def vanish(self) -> None:
        """What the death of the process does to who reads from it."""
        self._fabric.members.pop(self._key, None)
        self._progress.set()  # readers that wait for this source find it gone

    async def _move(
        self,
        transfer: PendingTransfer,
        source: LoopbackTransport,
        copies: tuple[Copy, ...],
        fault: Fault,
    ) -> None:
        await source._progress.wait()
        if self._is_gone(source, transfer):
            return
        half = len(copies) // 2
        self._copy(source, copies[:half])
        if fault.hang:
            await asyncio.get_running_loop().create_future()
        await asyncio.sleep(fault.delay_s)
        if fault.error is not None:
            transfer.end(TransportError(f"read from {transfer.peer} failed: {fault.error}"))
            return
        if self._is_gone(source, transfer):
            return
        self._copy(source, copies[half:])
        if fault.corrupt and self._pool is not None:
            self._pool[copies[-1].local] ^= 0xFF
        transfer.end(None)

    def _is_gone(self, source: LoopbackTransport, transfer: PendingTransfer) -> bool:
        gone = source._key not in self._fabric.members
        if gone:
            transfer.end(TransportError(f"{transfer.peer} is gone"))
        return gone

    def _copy(self, source: LoopbackTransport, copies: Sequence[Copy]) -> None:
        if self._pool is None or source._pool is None:
            raise InternalError("a read began without pools")
        for c in copies:
            self._pool[c.local : c.local + c.length] = source._pool[c.remote : c.remote + c.length]

    def _forget(self, task: asyncio.Task[None]) -> None:
        transfer = self._tasks.pop(task)
        if task.cancelled():
            transfer.end(TransportError(f"{transfer.peer} was disconnected during a read"))
        elif (error := task.exception()) is not None:
            transfer.end(TransportError(f"read from {transfer.peer} failed: {error}"))

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _pool_bytes(pool: Bytes | None) -> int:
    return 0 if pool is None else pool.nbytes
