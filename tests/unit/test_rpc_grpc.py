"""The gRPC adapter over loopback, without and with TLS: streams, deadlines, the token, how errors
arrive."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import ConfigError, InternalError, LayoutMismatch, PeerGone, Unauthenticated
from baton.rpc.grpc_client import (
    GrpcBlocksDialer,
    GrpcFleetClient,
    GrpcHandoffDialer,
    GrpcWorkerDialer,
)
from baton.rpc.grpc_server import LIVE, RpcServer
from baton.rpc.grpc_tls import make_channel
from baton.rpc.services import Duplex
from baton.rpc.tls import PEER_NAME, Certificates, TlsConfig
from baton.types.blocks import Ask, BlocksMessage, LendEnd
from baton.types.fleet import FleetLease, KvLayout, Role, WorkerInfo, WorkerLoad
from baton.types.handoff import Attach, DecodeMessage, PrefillMessage, Released
from baton.types.link import Cancel, ConductorMessage, Drain, StepReport, WorkerMessage
from baton.types.request import AttemptId, AttemptOutput
from tests.certificates import Authority

TOKEN = "secret"
LAYOUT = KvLayout("ab", "float32", 2, 2, 16, 32)
INFO = WorkerInfo("w", Role.DECODE, "i1", "127.0.0.1:1", 7, "demo", LAYOUT, 8, 64, "shm")

TLS: Certificates | None = None  # of the test that runs
WorkerEnd = Duplex[WorkerMessage, ConductorMessage]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    pair = authority.issue(PEER_NAME)
    return Certificates(TlsConfig(str(pair.cert), str(pair.key), str(authority.ca)))


@pytest.fixture(params=["plain", "tls"], autouse=True)
def _both_ways(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, certificates: Certificates
) -> None:
    chosen = certificates if request.param == "tls" else None
    monkeypatch.setattr(sys.modules[__name__], "TLS", chosen)


class Worker:
    def __init__(self, handle: Callable[[WorkerEnd], Awaitable[None]]) -> None:
        self._handle = handle

    async def link(self, stream: WorkerEnd) -> None:
        await self._handle(stream)


def report(name: str) -> StepReport:
    return StepReport((AttemptOutput(AttemptId(name)),), WorkerLoad(running=1))


async def echo(stream: WorkerEnd) -> None:
    """Answer every Cancel until the stream ends."""
    try:
        while True:
            message = await stream.receive()
            assert isinstance(message, Cancel)
            await stream.send(report(message.attempt.request_id))
    except PeerGone:
        return


@asynccontextmanager
async def serving(handle: Callable[[WorkerEnd], Awaitable[None]]) -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1:0", TOKEN, tls=TLS)
    server.add_worker(Worker(handle))
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop(0.1)


async def test_messages_keep_their_order_both_ways() -> None:
    async with serving(echo) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
        names = [f"r{number}" for number in range(200)]

        async def send_all() -> None:
            for name in names:
                await stream.send(Cancel(AttemptId(name), "test"))

        async with asyncio.TaskGroup() as group:
            group.create_task(send_all())
            for name in names:
                assert await stream.receive() == report(name)
        await stream.aclose()


async def test_a_cancelled_receive_loses_nothing() -> None:
    async with serving(echo) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await stream.receive()
        await stream.send(Cancel(AttemptId("late"), "test"))
        assert await stream.receive() == report("late")
        await stream.aclose()


async def test_close_delivers_what_was_sent_and_then_ends_both_sides() -> None:
    seen: list[ConductorMessage] = []
    ended = asyncio.Event()

    async def collect(stream: WorkerEnd) -> None:
        try:
            while True:
                seen.append(await stream.receive())
        except PeerGone:
            ended.set()

    async with serving(collect) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
        sent = [Cancel(AttemptId(str(number)), "bye") for number in range(50)]
        for message in sent:
            await stream.send(message)
        await stream.aclose()
        await stream.aclose()
        await asyncio.wait_for(ended.wait(), 5)
        assert seen == sent
        with pytest.raises(PeerGone):
            await stream.receive()
        with pytest.raises(PeerGone):
            await stream.send(Drain())


async def test_what_the_server_said_before_it_closed_arrives() -> None:
    async def talk(stream: WorkerEnd) -> None:
        for number in range(20):
            await stream.send(report(str(number)))
        await stream.aclose()
        with pytest.raises(PeerGone):
            await stream.send(report("late"))

    async with serving(talk) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
        for number in range(20):
            assert await stream.receive() == report(str(number))
        with pytest.raises(PeerGone):
            await stream.receive()
        await stream.aclose()


async def test_the_service_sees_a_vanished_client_as_peer_gone() -> None:
    outcome: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def wait(stream: WorkerEnd) -> None:
        try:
            await stream.receive()
        except BaseException as error:
            outcome.set_result(error)

    async with serving(wait) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
        stream._call.cancel()  # type: ignore[attr-defined]
        assert isinstance(await asyncio.wait_for(outcome, 5), PeerGone)
        await stream.aclose()


async def test_a_stopped_server_is_peer_gone_for_its_clients() -> None:
    async with serving(echo) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
    with pytest.raises(PeerGone):
        await asyncio.wait_for(stream.receive(), 5)
    await stream.aclose()


async def test_a_full_stream_makes_the_sender_wait_and_ends_with_peer_gone() -> None:
    async def sleep(stream: WorkerEnd) -> None:
        await stream.receive()
        await stream.aclose()

    async with serving(sleep) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
        bulk = Cancel(AttemptId("big"), "x" * 200_000)

        async def send_for_ever() -> None:
            while True:
                await stream.send(bulk)

        with pytest.raises(PeerGone):
            await asyncio.wait_for(send_for_ever(), 20)
        await stream.aclose()


async def test_closing_may_be_cancelled_and_leaves_nothing_behind() -> None:
    async def ignore(stream: WorkerEnd) -> None:
        with contextlib.suppress(PeerGone):
            await stream.receive()
            await asyncio.sleep(30)

    async with serving(ignore) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5.0)
        await stream.send(Drain())
        closing = asyncio.create_task(stream.aclose())
        await asyncio.sleep(0.05)  # now it waits for the server to end its side
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert "stream-pump" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_a_failing_service_reaches_the_caller_with_its_message() -> None:
    async def fail(stream: WorkerEnd) -> None:
        await stream.receive()  # the stream stands: a failure before that may fail the dialling
        raise LayoutMismatch("layouts A and B differ")

    async with serving(fail) as address:
        stream = await GrpcWorkerDialer(TOKEN, TLS).link(address, 5)
        await stream.send(Drain())
        with pytest.raises(PeerGone, match="layouts A and B differ"):
            await asyncio.wait_for(stream.receive(), 5)
        await stream.aclose()


async def test_dialing_nobody_is_peer_gone() -> None:
    async with serving(echo) as address:
        pass
    with pytest.raises(PeerGone) as gone:
        await GrpcWorkerDialer(TOKEN, TLS).link(address, 2)
    assert gone.value.message == f"the worker at {address} is gone: Connection refused"


async def test_dialing_a_silent_port_ends_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(PeerGone, match=r"within 0\.2 s"):
            await GrpcWorkerDialer(TOKEN, TLS).link(f"127.0.0.1:{port}", 0.2)


async def test_internal_services_need_the_token() -> None:
    async with serving(echo) as address:
        with pytest.raises(Unauthenticated, match="BATON_CLUSTER_TOKEN"):
            await GrpcWorkerDialer("wrong", TLS).link(address, 5)


async def test_a_server_without_a_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="BATON_CLUSTER_TOKEN"):
        RpcServer("127.0.0.1:0", "")


async def test_two_servers_on_one_port_are_refused() -> None:
    async with serving(echo) as address:
        with pytest.raises(ConfigError, match="cannot listen"):
            await RpcServer(address, TOKEN, tls=TLS).start()


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"\xfa\x3e\x00", "does not know"), (b"\xff\xff", "DecodeError")],  # field 1007; garbage
)
async def test_a_message_that_cannot_be_read_ends_the_stream(raw: bytes, message: str) -> None:
    ended = asyncio.Event()

    async def wait(stream: WorkerEnd) -> None:
        with pytest.raises(PeerGone, match=message):
            await stream.receive()
        ended.set()

    async with serving(wait) as address, make_channel(address, (), TLS) as channel:
        method = channel.stream_stream("/baton.v1.Worker/Link", bytes, bytes)
        call = method(metadata=(("authorization", f"Bearer {TOKEN}"),))
        await call.write(raw)
        await asyncio.wait_for(ended.wait(), 5)
        call.cancel()


class Prefill:
    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        message = await stream.receive()
        assert isinstance(message, Attach)
        await stream.send(Released(message.attempt))


async def test_handoff_streams() -> None:
    server = RpcServer("127.0.0.1:0", TOKEN, tls=TLS)
    server.add_handoff(Prefill())
    address = await server.start()
    stream = await GrpcHandoffDialer(TOKEN, TLS).pair(address, 5)
    await stream.send(Attach(AttemptId("a", 2)))
    assert await stream.receive() == Released(AttemptId("a", 2))
    await stream.aclose()
    await server.stop(0.1)


class Store:
    async def pair(self, stream: Duplex[BlocksMessage, BlocksMessage]) -> None:
        message = await stream.receive()
        assert isinstance(message, Ask)
        await stream.send(LendEnd(message.number, 0))


async def test_blocks_streams() -> None:
    server = RpcServer("127.0.0.1:0", TOKEN, tls=TLS)
    server.add_blocks(Store())
    address = await server.start()
    with pytest.raises(Unauthenticated, match="BATON_CLUSTER_TOKEN"):
        await GrpcBlocksDialer("wrong", TLS).pair(address, 5)
    stream = await GrpcBlocksDialer(TOKEN, TLS).pair(address, 5)
    await stream.send(Ask(7, bytes(16)))
    assert await stream.receive() == LendEnd(7, 0)
    await stream.aclose()
    await server.stop(0.1)


class Fleet:
    def __init__(self) -> None:
        self.calls: list[object] = []
        self.block = False

    async def register(self, info: WorkerInfo) -> FleetLease:
        self.calls.append(info)
        if info.name == "misfit":
            raise LayoutMismatch("this fleet has another layout")
        if info.name == "bug":
            raise ValueError("oops")
        return FleetLease(True, 3.0)

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        self.calls.append((name, incarnation, load))
        if self.block:
            await asyncio.Event().wait()
        return FleetLease(False, 3.0)

    async def leave(self, name: str, incarnation: str) -> None:
        self.calls.append((name, incarnation))


@asynccontextmanager
async def fleet(timeout_s: float = 5.0) -> AsyncIterator[tuple[Fleet, GrpcFleetClient]]:
    service = Fleet()
    server = RpcServer("127.0.0.1:0", TOKEN, tls=TLS)
    server.add_fleet(service)
    client = GrpcFleetClient(await server.start(), TOKEN, timeout_s, TLS)
    try:
        yield service, client
    finally:
        await client.aclose()
        await server.stop(0.1)


async def test_fleet_calls() -> None:
    async with fleet() as (service, client):
        load = WorkerLoad(running=2)
        assert await client.register(INFO) == FleetLease(True, 3.0)
        assert await client.renew("w", "i1", load) == FleetLease(False, 3.0)
        await client.leave("w", "i1")
        assert service.calls == [INFO, ("w", "i1", load), ("w", "i1")]


async def test_a_unary_error_arrives_as_the_class_that_was_raised() -> None:
    async with fleet() as (_, client):
        misfit = WorkerInfo("misfit", Role.DECODE, "i", "a:1", 1, "demo", LAYOUT, 8, 64, "shm")
        with pytest.raises(LayoutMismatch, match="another layout"):
            await client.register(misfit)
        bug = WorkerInfo("bug", Role.DECODE, "i", "a:1", 1, "demo", LAYOUT, 8, 64, "shm")
        with pytest.raises(InternalError, match="ValueError: oops"):
            await client.register(bug)


async def test_every_unary_call_has_a_deadline() -> None:
    async with fleet(timeout_s=0.2) as (service, client):
        service.block = True
        with pytest.raises(PeerGone, match="in time"):
            await client.renew("w", "i1", WorkerLoad())


async def test_health_follows_readiness_and_needs_no_token() -> None:
    server = RpcServer("127.0.0.1:0", TOKEN, tls=TLS)
    address = await server.start()
    async with make_channel(address, (), TLS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        status = health_pb2.HealthCheckResponse
        assert (await stub.Check(request)).status == status.NOT_SERVING
        await server.set_ready(True)
        assert (await stub.Check(request)).status == status.SERVING
    await server.stop(0.1)


async def test_a_server_lives_from_its_start_whether_or_not_it_is_ready() -> None:
    server = RpcServer("127.0.0.1:0", TOKEN, tls=TLS)
    address = await server.start()
    async with make_channel(address, (), TLS) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        live = health_pb2.HealthCheckRequest(service=LIVE)
        for ready in (False, True, False):
            await server.set_ready(ready)
            answer = await stub.Check(live)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0.1)
