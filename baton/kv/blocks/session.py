"""One stream of blocks messages between two processes that have greeted each other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.errors import BatonError, InvalidRequest, PeerGone, TransportError
from baton.kv.blocks.options import BlocksOptions
from baton.kv.identity import Identity, check_peer, is_ttl, life
from baton.kv.settle import uninterrupted
from baton.kv.transport.base import Transport
from baton.rpc.errors import from_wire, to_wire
from baton.rpc.services import BlocksDialer, Duplex
from baton.types.blocks import BlocksHello, BlocksMessage, BlocksRefused
from baton.types.fleet import Peer

log = logging.getLogger(__name__)

BlocksStream = Duplex[BlocksMessage, BlocksMessage]

OUTBOX = 1024  # messages; a caller that takes none of them is not listened to either
REFUSE_S = 2.0


class Session:
    """`say` never waits and keeps the order. `key` names the peer's life to the transport, which
    is connected to it; `ttl_s` is the lease of what the peer lends."""

    def __init__(self, stream: BlocksStream, hello: BlocksHello, transport: Transport) -> None:
        self.key = life(hello.name, hello.incarnation)
        self.ttl_s = hello.lease_ttl_s
        self.transport = transport
        self._stream = stream
        self._outbox: asyncio.Queue[BlocksMessage] = asyncio.Queue()
        self._room = asyncio.Event()
        self._room.set()

    def say(self, message: BlocksMessage) -> None:
        self._outbox.put_nowait(message)
        if self._outbox.qsize() >= OUTBOX:
            self._room.clear()

    async def receive(self) -> BlocksMessage:
        """Raises PeerGone at the stream's end."""
        return await self._stream.receive()

    async def room(self) -> None:
        """Return when the peer has taken enough of what was said. Only for the serving side, which
        others make work for: were both sides to wait for it, they might wait for each other."""
        await self._room.wait()

    async def send_all(self) -> None:
        """What was said, until the stream ends or this is cancelled. Owned by `session`."""
        try:
            while True:
                await self._stream.send(await self._outbox.get())
                if self._outbox.qsize() < OUTBOX:
                    self._room.set()
        except PeerGone:
            self._room.set()  # the receiving side notices too and ends the session
        except Exception:
            log.exception("a message could not be sent to %s: the stream is closed", self.key)
            self._room.set()
            await self._stream.aclose()

    async def refuse(self, error: BatonError) -> None:
        """The peer has made no sense: tell it why the stream ends."""
        with contextlib.suppress(PeerGone, TimeoutError):
            async with asyncio.timeout(REFUSE_S):
                await self._stream.send(BlocksRefused(None, to_wire(error)))

    async def break_off(self) -> None:
        """End the stream and every read from the peer that this session's transport has begun."""
        await self._stream.aclose()
        await self.transport.disconnect(self.key)


@asynccontextmanager
async def dialled(
    peer: Peer,
    identity: Identity,
    transport: Transport,
    dialer: BlocksDialer,
    options: BlocksOptions,
) -> AsyncIterator[Session]:
    """Dial `peer` and greet it. An empty incarnation means whichever life is there, by any name.

    Raises PeerGone, LayoutMismatch, ConfigError or TransportError.
    """
    stream: BlocksStream | None = None
    try:
        try:
            async with asyncio.timeout(options.hello_timeout_s):
                stream = await dialer.pair(peer.address, options.hello_timeout_s)
                await stream.send(_hello(identity, transport, options, peer.incarnation))
                hello = _check_answer(await stream.receive(), peer, identity, transport)
                await transport.connect(life(hello.name, hello.incarnation), hello.endpoint)
        except TimeoutError:
            text = f"{peer.name or 'the peer'} at {peer.address} did not answer in time"
            raise PeerGone(text) from None
        session = Session(stream, hello, transport)
        async with _sending(session):
            yield session
    finally:
        try:
            await uninterrupted(transport.close())  # half done, it would keep what it holds
        finally:
            if stream is not None:
                await stream.aclose()


@asynccontextmanager
async def answered(
    stream: BlocksStream, identity: Identity, transport: Transport, options: BlocksOptions
) -> AsyncIterator[Session]:
    """Let the dialing side greet, and answer. Raises what it was refused with, PeerGone when it
    went or said nothing in time."""
    try:
        try:
            async with asyncio.timeout(options.hello_timeout_s):
                greeting = await stream.receive()
                try:
                    hello = _check_call(greeting, identity, transport)
                    await transport.connect(life(hello.name, hello.incarnation), hello.endpoint)
                except BatonError as error:
                    await stream.send(BlocksRefused(None, to_wire(error)))
                    raise
                await stream.send(_hello(identity, transport, options))
        except TimeoutError:
            raise PeerGone("a stream was opened, and nobody greeted in time") from None
        session = Session(stream, hello, transport)
        async with _sending(session):
            yield session
    finally:
        try:
            await uninterrupted(transport.close())
        finally:
            await stream.aclose()


@asynccontextmanager
async def _sending(session: Session) -> AsyncIterator[None]:
    sender = asyncio.create_task(session.send_all(), name=f"blocks sender to {session.key}")
    try:
        yield
    finally:
        sender.cancel()
        await asyncio.wait([sender])


def _hello(
    identity: Identity, transport: Transport, options: BlocksOptions, expected: str = ""
) -> BlocksHello:
    return BlocksHello(
        identity.name,
        identity.incarnation,
        identity.layout,
        transport.name,
        transport.endpoint(),
        options.lease_ttl_s,
        expected,
    )


def _check_answer(
    hello: BlocksMessage, peer: Peer, identity: Identity, transport: Transport
) -> BlocksHello:
    """Raises why the dialled peer is not one to exchange blocks with."""
    who = peer.name or peer.address
    if isinstance(hello, BlocksRefused):
        raise from_wire(hello.error)
    if not isinstance(hello, BlocksHello) or not is_ttl(hello.lease_ttl_s):
        raise TransportError(f"{who} answered a greeting with {hello!r}")
    found = life(hello.name, hello.incarnation)
    if peer.incarnation and found != life(peer.name, peer.incarnation):
        raise PeerGone(
            f"{peer.address} is {found}, not {life(peer.name, peer.incarnation)}: "
            "the process was restarted"
        )
    _check(hello, identity, transport)
    return hello


def _check_call(hello: BlocksMessage, identity: Identity, transport: Transport) -> BlocksHello:
    """Raises why the dialing side is refused."""
    if not isinstance(hello, BlocksHello) or not is_ttl(hello.lease_ttl_s):
        raise InvalidRequest(f"a blocks stream begins with a greeting, not {hello!r}")
    if hello.expected_incarnation not in ("", identity.incarnation):
        raise PeerGone(  # that life has: others may have the blocks
            f"{hello.name} looks for life {hello.expected_incarnation} of {identity.name}, but "
            f"this is life {identity.incarnation}: the process was restarted"
        )
    _check(hello, identity, transport)
    return hello


def _check(hello: BlocksHello, identity: Identity, transport: Transport) -> None:
    theirs = Identity(hello.name, hello.incarnation, hello.layout)
    check_peer(identity, transport.name, theirs, hello.transport)
