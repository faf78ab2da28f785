"""gRPC streams as Duplex.

    send -> outbox (bounded) -> writer task -> wire        wire -> reader task -> inbox -> receive

The two tasks stand between the caller and grpc because cancelling a grpc read or write cancels the
whole stream, and here `asyncio.timeout` around `receive` must be harmless.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import grpc

from baton.errors import BatonError, PeerGone
from baton.rpc.errors import from_status
from baton.rpc.pipe import Pipe

Out = TypeVar("Out")
In = TypeVar("In")

CAPACITY = 64  # messages per direction before the sender waits
FLUSH_S = 2.0  # how long `aclose` tries to deliver what was sent before


class Wire(Protocol):
    """What grpc.aio calls and servicer contexts have in common. Messages are protobuf."""

    async def read(self) -> Any: ...

    async def write(self, message: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Codec(Generic[Out, In]):
    encode: Callable[[Out], Any]
    decode: Callable[[Any], In]


class WireDuplex(Generic[Out, In]):
    """A Duplex over a grpc stream.

    Owned by whoever calls `run`: it returns when the stream has ended in both directions, and never
    raises because of the peer. `finish` tells the peer that nothing more will come.
    """

    def __init__(
        self,
        wire: Wire,
        codec: Codec[Out, In],
        peer: str,
        finish: Callable[[], Awaitable[None]],
    ) -> None:
        self._wire = wire
        self._codec = codec
        self._peer = peer
        self._finish = finish
        self._outbox: Pipe[Any] = Pipe(CAPACITY)  # encoded, so that a bad value fails its sender
        self._inbox: Pipe[In] = Pipe(CAPACITY)
        self._flushed = asyncio.Event()

    async def send(self, message: Out) -> None:
        await self._outbox.put(self._codec.encode(message))

    async def receive(self) -> In:
        return await self._inbox.get()

    async def aclose(self) -> None:
        reason = f"the stream to {self._peer} was closed here"
        self._inbox.end(reason, discard=True)
        self._outbox.end(reason)
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._flushed.wait()
        except TimeoutError:
            self._outbox.end(reason, discard=True)

    async def run(self) -> None:
        """Move messages until the peer ends the stream, it breaks, or this task is cancelled."""
        writer = asyncio.create_task(self._write_all(), name=f"stream-writer {self._peer}")
        try:
            await self._read_all()
        finally:
            self.lose(f"{self._peer} ended the stream")
            writer.cancel()
            await asyncio.wait([writer])

    def lose(self, reason: str) -> None:
        """The peer cannot be reached any more: fail senders, let receivers drain."""
        self._inbox.end(reason)
        self._outbox.end(reason, discard=True)
        self._flushed.set()

    async def _read_all(self) -> None:
        try:
            while (message := await self._wire.read()) is not grpc.aio.EOF:
                await self._deliver(self._codec.decode(message))
        except Exception as error:
            self.lose(self._why(error))

    async def _deliver(self, message: In) -> None:
        try:
            await self._inbox.put(message)
        except PeerGone:
            return  # closed here: keep reading until the peer notices, but keep nothing

    async def _write_all(self) -> None:
        try:
            while True:
                await self._wire.write(await self._outbox.get())
        except PeerGone:
            await self._finish()
        except Exception as error:
            self.lose(self._why(error))
        finally:
            self._flushed.set()

    def _why(self, error: Exception) -> str:
        """What ended the stream: a status, a message that cannot be decoded, or a grpc error."""
        if isinstance(error, grpc.aio.AioRpcError):
            return from_status(error, self._peer).message
        if isinstance(error, BatonError):
            return error.message
        return f"the stream to {self._peer} broke: {type(error).__name__}: {error}"
