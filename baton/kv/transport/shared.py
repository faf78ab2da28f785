"""One transport for several users, each with connections of its own.

    stream of a handoff ------> view 1 --.
    stream of lent blocks ----> view 2 ---+--> transport: connected to a peer while any view is
    another stream -----------> view 3 --'

Two processes may have several streams between them, for different purposes and in both directions,
but a transport knows each peer once. A view is a Transport that its user may connect and disconnect
as if it were alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from baton.errors import InternalError, TransportError
from baton.kv.transport.base import Copy, PoolMemory, Transfer, Transport
from baton.kv.transport.transfer import unknown_peer

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Connection:
    """To one peer. `wanted` counts views that hold it or wait for `lock`."""

    endpoint: bytes = b""
    users: set[TransportView] = field(default_factory=set)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    wanted: int = 0


class SharedTransport:
    """`transport` must have been started, with its pool allocated, by its owner, who closes it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._connections: dict[str, _Connection] = {}

    def view(self) -> TransportView:
        return TransportView(self)

    async def join(self, view: TransportView, peer: str, endpoint: bytes) -> None:
        """Raises TransportError, and then holds nothing."""
        connection = self._connections.setdefault(peer, _Connection())
        connection.wanted += 1
        try:
            async with connection.lock:
                if not connection.users or connection.endpoint != endpoint:
                    await self._connect(peer, endpoint)
                connection.endpoint = endpoint
                connection.users.add(view)
        finally:
            self._done(peer, connection)

    async def part(self, view: TransportView, peer: str, cut: bool) -> None:
        """`cut`: end all reads from the peer, also those of others, who are connected anew."""
        connection = self._connections.get(peer)
        if connection is None:
            return
        connection.wanted += 1
        try:
            async with connection.lock:
                connection.users.discard(view)
                if cut or not connection.users:
                    await self.transport.disconnect(peer)
                if cut and connection.users:
                    await self._again(peer, connection)
        finally:
            self._done(peer, connection)

    async def _connect(self, peer: str, endpoint: bytes) -> None:
        try:
            await self.transport.connect(peer, endpoint)
        except asyncio.CancelledError:  # it may stand by now, and nobody would end it
            await self.transport.disconnect(peer)
            raise

    async def _again(self, peer: str, connection: _Connection) -> None:
        try:
            await self.transport.connect(peer, connection.endpoint)
        except TransportError as error:  # their reads fail, and their streams will
            log.warning("%s could not be connected again: %s", peer, error.message)

    def _done(self, peer: str, connection: _Connection) -> None:
        connection.wanted -= 1
        if not connection.wanted and not connection.users:
            self._connections.pop(peer, None)


class TransportView:
    """Implements Transport for one user. `close` leaves the others, and the pool, alone."""

    def __init__(self, shared: SharedTransport) -> None:
        self._shared = shared
        self._peers: set[str] = set()
        self._running: dict[_Tracked, str] = {}
        self.name = shared.transport.name

    async def start(self) -> None:
        """The owner of the transport has started it."""

    def allocate(self, nbytes: int, device: str = "cpu", backing: Path | None = None) -> PoolMemory:
        raise InternalError("the pool of a shared transport is allocated by its owner")

    def endpoint(self) -> bytes:
        return self._shared.transport.endpoint()

    async def connect(self, peer: str, endpoint: bytes) -> None:
        await self.disconnect(peer)
        await self._shared.join(self, peer, endpoint)
        self._peers.add(peer)

    async def disconnect(self, peer: str) -> None:
        """Reads of this view that still run cost the other views theirs from the same peer."""
        if peer in self._peers:
            self._peers.discard(peer)
            await self._shared.part(self, peer, cut=peer in self._running.values())

    def read(self, peer: str, copies: Sequence[Copy]) -> Transfer:
        if peer not in self._peers:
            raise unknown_peer(peer)
        transfer = _Tracked(self._shared.transport.read(peer, copies), self._running)
        self._running[transfer] = peer
        return transfer

    def serving(self, peer: str) -> AbstractContextManager[None]:
        return self._shared.transport.serving(peer)

    async def close(self) -> None:
        for peer in tuple(self._peers):
            await self.disconnect(peer)


class _Tracked:
    """A Transfer that its view knows of until it is idle."""

    def __init__(self, transfer: Transfer, running: dict[_Tracked, str]) -> None:
        self._transfer = transfer
        self._running = running

    async def wait(self) -> None:
        await self._transfer.wait()
        self._running.pop(self, None)

    async def abort(self) -> None:
        await self._transfer.abort()
        self._running.pop(self, None)
