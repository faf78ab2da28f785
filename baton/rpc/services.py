"""The services seam: every conversation between processes, as protocols over plain values.

gRPC (`baton.rpc.grpc_*`) is one adapter; the in-memory adapter (`baton.rpc.memory`) is the other.
Policy code sees only what is written here.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from baton.types.blocks import BlocksMessage
from baton.types.fleet import FleetLease, WorkerInfo, WorkerLoad
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.link import ConductorMessage, WorkerMessage

Out = TypeVar("Out", contravariant=True)
In = TypeVar("In", covariant=True)


class Duplex(Protocol[Out, In]):
    """One end of a bidirectional stream. Messages keep their order; nothing is delivered twice.

    After the other end has gone (or `aclose` was called), `receive` delivers what had already
    arrived and then raises `PeerGone`; `send` raises `PeerGone`.
    """

    async def send(self, message: Out) -> None:
        """Return when the message is on its way (bounded buffering: may wait for the peer)."""

    async def receive(self) -> In: ...

    async def aclose(self) -> None:
        """End the stream for both sides. Safe to call twice."""


class WorkerService(Protocol):
    """Implemented by prefill and decode workers, called by conductors."""

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        """Serve one conductor until the stream ends; then cancel what it had started, except what
        another conductor may adopt."""


class HandoffService(Protocol):
    """Implemented by prefill workers, called by decode workers."""

    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        """Serve one decode worker until the stream ends; then free what it had attached."""


class BlocksService(Protocol):
    """Implemented by stores and by workers that lend, called by workers."""

    async def pair(self, stream: Duplex[BlocksMessage, BlocksMessage]) -> None:
        """Serve one worker until the stream ends; then end all its loans."""


class FleetService(Protocol):
    """Implemented by conductors, called by workers. Also the client side of it."""

    async def register(self, info: WorkerInfo) -> FleetLease:
        """Raises LayoutMismatch or ProtocolMismatch when the worker does not fit the fleet."""

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease: ...

    async def leave(self, name: str, incarnation: str) -> None: ...


class WorkerDialer(Protocol):
    """How a conductor reaches workers."""

    async def link(self, address: str, timeout_s: float) -> Duplex[ConductorMessage, WorkerMessage]:
        """Raises PeerGone when the worker cannot be reached in time, and the worker's own
        BatonError when it ends the stream before it stands."""


class BlocksDialer(Protocol):
    """How a worker reaches stores and other workers that lend."""

    async def pair(self, address: str, timeout_s: float) -> Duplex[BlocksMessage, BlocksMessage]:
        """Raises PeerGone when the peer cannot be reached in time, and the peer's own BatonError
        when it ends the stream before it stands."""


class HandoffDialer(Protocol):
    """How a decode worker reaches prefill workers."""

    async def pair(self, address: str, timeout_s: float) -> Duplex[DecodeMessage, PrefillMessage]:
        """Raises PeerGone when the worker cannot be reached in time, and the worker's own
        BatonError when it ends the stream before it stands."""
