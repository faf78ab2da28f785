"""What a transport is told about a peer (with NIXL, it unpickles that) comes from authenticated
peers only: nobody else's reaches `connect`, on neither side of a stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from baton.errors import BatonError, PeerGone, Unauthenticated
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.session import BlocksStream, answered, dialled
from baton.kv.handoff.options import HandoffOptions
from baton.kv.handoff.publisher import DecodeStream, HandoffPublisher
from baton.kv.identity import Identity
from baton.kv.transport.loopback import LoopbackFabric, LoopbackTransport
from baton.rpc.grpc_client import GrpcBlocksDialer, GrpcHandoffDialer
from baton.rpc.grpc_server import RpcServer
from baton.rpc.tls import PEER_NAME, Certificates, TlsConfig
from baton.types.blocks import BlocksHello
from baton.types.fleet import KvLayout, Peer
from baton.types.handoff import Hello
from tests.certificates import Authority

TOKEN = "secret"
LAYOUT = KvLayout("0123456789abcdef", "float32", 2, 1, 8, 4)
US, EVIL = Identity("us", "life", LAYOUT), Identity("evil", "life", LAYOUT)
POISON = b"cos\nsystem\n(S'true'\ntR."  # would run a command when it is unpickled


class Spy(LoopbackTransport):
    """Notes what it is told to connect to."""

    def __init__(self) -> None:
        super().__init__("us", LoopbackFabric())
        self.told: list[bytes] = []

    async def connect(self, peer: str, endpoint: bytes) -> None:
        self.told.append(endpoint)
        await super().connect(peer, endpoint)


class Poisonous(LoopbackTransport):
    """Of a peer that wants to break in."""

    def __init__(self) -> None:
        super().__init__("evil", LoopbackFabric())

    def endpoint(self) -> bytes:
        return POISON

    async def connect(self, peer: str, endpoint: bytes) -> None:
        """It takes everybody."""


class Handoffs:
    def __init__(self, transport: LoopbackTransport) -> None:
        memory = transport.allocate(LAYOUT.block_bytes)
        self._publisher = HandoffPublisher(
            US, transport, memory, lambda _: None, lambda *_: None, HandoffOptions()
        )

    async def pair(self, stream: DecodeStream) -> None:
        await self._publisher.serve(stream)


class Blocks:
    def __init__(self, identity: Identity, transport: LoopbackTransport) -> None:
        self._identity = identity
        self._transport = transport
        self.greeted = False

    async def pair(self, stream: BlocksStream) -> None:
        try:
            async with answered(stream, self._identity, self._transport, BlocksOptions()):
                self.greeted = True
        except BatonError:
            self.greeted = True


@dataclass(frozen=True, slots=True)
class World:
    ours: Authority
    other: Authority

    def certificates(self, of: Authority) -> Certificates:
        pair = of.issue(PEER_NAME)
        return Certificates(TlsConfig(str(pair.cert), str(pair.key), str(of.ca)))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(Authority(tmp_path, "ours"), Authority(tmp_path, "other"))


@asynccontextmanager
async def server(
    tls: Certificates | None, blocks: Blocks, handoffs: Handoffs | None = None
) -> AsyncIterator[str]:
    made = RpcServer("127.0.0.1:0", TOKEN, tls=tls)
    made.add_blocks(blocks)
    if handoffs is not None:
        made.add_handoff(handoffs)
    try:
        yield await made.start()
    finally:
        await made.stop(0.1)


async def greet_handoffs(address: str, token: str, tls: Certificates | None) -> None:
    stream = await GrpcHandoffDialer(token, tls).pair(address, 5.0)
    try:
        hello = Hello(EVIL.name, EVIL.incarnation, LAYOUT, "loopback", POISON)
        await stream.send(replace(hello, expected_incarnation=US.incarnation))
        await stream.receive()
    finally:
        await stream.aclose()


async def greet_blocks(address: str, token: str, tls: Certificates | None) -> None:
    stream = await GrpcBlocksDialer(token, tls).pair(address, 5.0)
    try:
        await stream.send(BlocksHello("evil", "life", LAYOUT, "loopback", POISON, 5.0))
        await stream.receive()
    finally:
        await stream.aclose()


Greet = Callable[[str, str, Certificates | None], Awaitable[None]]


@pytest.mark.parametrize("greet", [greet_handoffs, greet_blocks])
async def test_who_calls_is_heard_only_when_authenticated(world: World, greet: Greet) -> None:
    spy = Spy()
    good = world.certificates(world.ours)
    async with server(good, Blocks(US, spy), Handoffs(spy)) as address:
        for token, tls, refusal in (
            (TOKEN, None, PeerGone),
            (TOKEN, world.certificates(world.other), PeerGone),
            ("wrong", good, Unauthenticated),
        ):
            with pytest.raises(refusal):
                await greet(address, token, tls)
        assert spy.told == []
        await greet(address, TOKEN, good)  # the trial would notice
        assert spy.told == [POISON]


async def test_who_is_called_is_heard_only_when_authenticated(world: World) -> None:
    good = world.certificates(world.ours)
    for tls in (None, world.certificates(world.other), good):
        spy, evil = Spy(), Blocks(EVIL, Poisonous())
        async with server(tls, evil) as address:
            peer = Peer(EVIL.name, EVIL.incarnation, address)
            dialer = GrpcBlocksDialer(TOKEN, good)
            with pytest.raises(BatonError):
                async with dialled(peer, US, spy, dialer, BlocksOptions()):
                    pass
        assert spy.told == ([POISON] if tls is good else [])
        assert evil.greeted == (tls is good)


async def test_without_tls_the_token_is_what_counts() -> None:
    spy = Spy()
    async with server(None, Blocks(US, spy), Handoffs(spy)) as address:
        for greet in (greet_handoffs, greet_blocks):
            with pytest.raises(Unauthenticated):
                await greet(address, "wrong", None)
    assert spy.told == []
