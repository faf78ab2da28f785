"""Internal services with TLS: who is refused, what refusals say, and new certificates meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import PeerGone, Unauthenticated
from baton.rpc.grpc_client import (
    GrpcBlocksDialer,
    GrpcFleetClient,
    GrpcHandoffDialer,
    GrpcWorkerDialer,
    bearer,
)
from baton.rpc.grpc_server import LIVE, RpcServer
from baton.rpc.grpc_tls import make_channel
from baton.rpc.services import Duplex
from baton.rpc.tls import PEER_NAME, Certificates, Pems, TlsConfig
from baton.types.blocks import BlocksMessage
from baton.types.fleet import FleetLease, KvLayout, Role, WorkerInfo, WorkerLoad
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.link import ConductorMessage, WorkerMessage
from baton.v1 import fleet_pb2, fleet_pb2_grpc
from tests.certificates import Authority, Pair

TOKEN = "secret"
LAYOUT = KvLayout("ab", "float32", 2, 2, 16, 32)
INFO = WorkerInfo("w", Role.DECODE, "i1", "127.0.0.1:1", 7, "demo", LAYOUT, 8, 64, "shm")
LEASE = FleetLease(True, 3.0)


class Everything:
    """All internal services. `calls` says what got through."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def register(self, info: WorkerInfo) -> FleetLease:
        self.calls.append("register")
        return LEASE

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        self.calls.append("renew")
        return LEASE

    async def leave(self, name: str, incarnation: str) -> None:
        self.calls.append("leave")

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        self.calls.append("link")


class Handoff:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        self._calls.append("handoff")


class Blocks:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    async def pair(self, stream: Duplex[BlocksMessage, BlocksMessage]) -> None:
        self._calls.append("blocks")


@dataclass(frozen=True, slots=True)
class World:
    ours: Authority
    other: Authority
    pair: Pair  # the files of the server
    service: Everything
    server: RpcServer
    address: str

    def peer(self, pair: Pair | None = None, trusts: Authority | None = None) -> Certificates:
        pair = pair or self.ours.issue(PEER_NAME)
        authority = trusts or self.ours
        return Certificates(TlsConfig(str(pair.cert), str(pair.key), str(authority.ca)))


@asynccontextmanager
async def serving(directory: Path, tls: bool = True, health: str = "") -> AsyncIterator[World]:
    ours, other = Authority(directory, "ours"), Authority(directory, "other")
    pair, service = ours.issue(PEER_NAME), Everything()
    config = TlsConfig(str(pair.cert), str(pair.key), str(ours.ca))
    certificates = Certificates(config) if tls else None
    server = RpcServer("127.0.0.1:0", TOKEN, tls=certificates, health_listen=health)
    server.add_fleet(service)
    server.add_worker(service)
    server.add_handoff(Handoff(service.calls))
    server.add_blocks(Blocks(service.calls))
    address = await server.start()
    try:
        yield World(ours, other, pair, service, server, address)
    finally:
        await server.stop(0.1)


async def try_all(world: World, tls: Certificates | None) -> list[str]:
    """Every internal service. What the attempts failed with."""
    client = GrpcFleetClient(world.address, TOKEN, tls=tls)
    dialers = (GrpcHandoffDialer(TOKEN, tls), GrpcBlocksDialer(TOKEN, tls))
    calls = [
        client.register(INFO),
        client.renew("w", "i1", WorkerLoad()),
        client.leave("w", "i1"),
        GrpcWorkerDialer(TOKEN, tls).link(world.address, 5.0),
        *(dialer.pair(world.address, 5.0) for dialer in dialers),
    ]
    results = await asyncio.gather(*calls, return_exceptions=True)
    await client.aclose()
    for result in results:
        if not isinstance(result, BaseException | FleetLease | None):
            await result.aclose()
    assert {type(each) for each in results if isinstance(each, BaseException)} <= {
        PeerGone,
        Unauthenticated,
    }
    return [each.message for each in results if isinstance(each, PeerGone | Unauthenticated)]


async def test_a_peer_of_the_cluster_reaches_everything(tmp_path: Path) -> None:
    async with serving(tmp_path) as world:
        assert await try_all(world, world.peer()) == []
        assert sorted(world.service.calls) == [
            "blocks",
            "handoff",
            "leave",
            "link",
            "register",
            "renew",
        ]


async def test_strangers_reach_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They know the token, and still: no certificate, one of another authority, one that is for
    something else."""
    async with serving(tmp_path) as world:
        plain = await try_all(world, None)
        assert len(plain) == 6
        assert all("it may want TLS" in said for said in plain)
        forged = tmp_path / "both.crt"  # trusts both: the server is what refuses
        forged.write_bytes(world.ours.ca.read_bytes() + world.other.ca.read_bytes())
        pair = world.other.issue(PEER_NAME)
        stranger = Certificates(TlsConfig(str(pair.cert), str(pair.key), str(forged)))
        refused = await try_all(world, stranger)
        assert len(refused) == 6
        assert all("did not accept our certificate" in said for said in refused)
        pair = world.ours.issue("printer")
        # Such a process could not be configured: it calls its peers by a name that it has not.
        unchecked = world.peer()
        pems = Pems(pair.cert.read_bytes(), pair.key.read_bytes(), world.ours.ca.read_bytes(), 0.0)
        monkeypatch.setattr(unchecked, "current", lambda: pems)
        printer = await try_all(world, unchecked)
        assert len(printer) == 6
        assert all("certificate is not for 'baton'" in said for said in printer)
        assert world.service.calls == []


async def test_a_client_without_a_certificate_does_not_get_in(tmp_path: Path) -> None:
    async with serving(tmp_path) as world:
        credentials = grpc.ssl_channel_credentials(world.ours.ca.read_bytes())
        options = [("grpc.ssl_target_name_override", PEER_NAME)]
        async with grpc.aio.secure_channel(world.address, credentials, options) as channel:
            for stub in (fleet_pb2_grpc.FleetStub(channel).Leave, _health(channel)):
                with pytest.raises(grpc.aio.AioRpcError) as failure:
                    await stub(fleet_pb2.LeaveRequest(), timeout=5, metadata=bearer(TOKEN))
                assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert world.service.calls == []


def _health(channel: grpc.aio.Channel) -> object:
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=lambda _: b"",
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


async def test_a_certificate_does_not_replace_the_token(tmp_path: Path) -> None:
    async with serving(tmp_path) as world:
        with pytest.raises(Unauthenticated, match="BATON_CLUSTER_TOKEN"):
            await GrpcWorkerDialer("wrong", world.peer()).link(world.address, 5.0)


async def test_a_server_that_is_a_stranger_learns_nothing(tmp_path: Path) -> None:
    """The token is not sent to somebody who cannot show a certificate of the cluster."""
    async with serving(tmp_path) as world:
        pair = world.other.issue(PEER_NAME)
        said = await try_all(world, world.peer(pair, trusts=world.other))
        assert len(said) == 6
        assert all("not of an authority in our --tls-ca" in each for each in said)
    async with serving(tmp_path, tls=False) as plain:
        said = await try_all(plain, plain.peer())
        assert len(said) == 6
        assert all("does not speak TLS" in each for each in said)
        assert plain.service.calls == []


async def test_both_sides_take_new_certificates_up(tmp_path: Path) -> None:
    """By way of both authorities: peers get the new one, then new certificates, then the old one is
    taken away. Streams that are there go on."""
    async with serving(tmp_path) as world:
        pair = world.ours.issue(PEER_NAME)
        ca = tmp_path / "peer-ca.crt"
        ca.write_bytes(world.ours.ca.read_bytes())
        tls = Certificates(TlsConfig(str(pair.cert), str(pair.key), str(ca)))
        client = GrpcFleetClient(world.address, TOKEN, tls=tls)
        assert await client.register(INFO) == LEASE
        both = world.ours.ca.read_bytes() + world.other.ca.read_bytes()
        new = world.other.ca.read_bytes()
        for trusted in (both, new):
            for path in (world.ours.ca, ca):
                path.write_bytes(trusted)
            if trusted == both:
                for side in (world.pair, pair):
                    issued = world.other.issue(PEER_NAME)
                    side.cert.write_bytes(issued.cert.read_bytes())
                    side.key.write_bytes(issued.key.read_bytes())
            assert await client.renew("w", "i1", WorkerLoad()) == LEASE
            await (await GrpcWorkerDialer(TOKEN, tls).link(world.address, 5.0)).aclose()
        await client.aclose()
        assert tls.current().ca == new


async def test_a_long_lived_client_outlives_its_certificate(tmp_path: Path) -> None:
    """Its channel would show the old one when it connects again."""
    async with serving(tmp_path) as world:
        pair = world.ours.issue(PEER_NAME)
        tls = world.peer(pair)
        client = GrpcFleetClient(world.address, TOKEN, tls=tls)
        await client.register(INFO)
        before = client._channel
        await client.renew("w", "i1", WorkerLoad())
        assert client._channel is before
        for _ in range(3):
            new = world.ours.issue(PEER_NAME)
            pair.cert.write_bytes(new.cert.read_bytes())
            pair.key.write_bytes(new.key.read_bytes())
            await client.renew("w", "i1", WorkerLoad())
            assert client._channel is not before
            before = client._channel
        await client.aclose()


async def test_probes_without_a_certificate_have_their_own_port(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    at = f"127.0.0.1:{unused_tcp_port}"
    async with serving(tmp_path, health=at) as world, make_channel(at, (), None) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status = health_pb2.HealthCheckResponse
        for name, ready, expected in (
            (LIVE, False, status.SERVING),
            ("", False, status.NOT_SERVING),
            ("", True, status.SERVING),
        ):
            await world.server.set_ready(ready)
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == expected
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await fleet_pb2_grpc.FleetStub(channel).Leave(
                fleet_pb2.LeaveRequest(), metadata=bearer(TOKEN)
            )
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_bad_new_certificate_of_a_server_leaves_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as world:
        world.pair.cert.write_text("broken")
        with caplog.at_level(logging.WARNING):
            await (await GrpcWorkerDialer(TOKEN, world.peer()).link(world.address, 5.0)).aclose()
        assert "stays in use" in caplog.text
