"""One gRPC server per process: internal services behind the cluster token, health, reflection.

server = RpcServer("127.0.0.1:0", token)
server.add_worker(service)
address = await server.start()      # the real port
...
await server.stop(grace_s=5)
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.errors import BatonError, ConfigError, InvalidRequest, Unauthenticated
from baton.rpc.codec_blocks import blocks_from_pb, blocks_to_pb
from baton.rpc.codec_fleet import info_from_pb, lease_to_pb, load_from_pb
from baton.rpc.codec_handoff import decode_from_pb, prefill_to_pb
from baton.rpc.codec_link import conductor_from_pb
from baton.rpc.codec_report import ReportEncoder
from baton.rpc.errors import status_of, to_wire, trailing_metadata
from baton.rpc.grpc_client import MAX_MESSAGE_BYTES
from baton.rpc.grpc_stream import Codec, WireDuplex
from baton.rpc.grpc_tls import PeerNameInterceptor, server_credentials
from baton.rpc.services import (
    BlocksService,
    Duplex,
    FleetService,
    HandoffService,
    WorkerService,
)
from baton.rpc.tls import Certificates, FrontCertificate
from baton.types.blocks import BlocksMessage
from baton.types.fleet import FleetLease
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.link import ConductorMessage, WorkerMessage
from baton.v1 import (
    blocks_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    handoff_pb2_grpc,
    worker_pb2_grpc,
)

Out = TypeVar("Out")
In = TypeVar("In")

log = logging.getLogger("baton.rpc")

LIVE = "live"
"""What a liveness probe asks the health service for: SERVING as long as the event loop answers. A
process that no conductor knows yet is not ready, and is not to be killed for it."""

WIND_UP_S = 10.0  # how long a service may clean up after its stream has ended
INTERNAL_SERVICES = (
    "/baton.v1.Worker/",
    "/baton.v1.Handoff/",
    "/baton.v1.Blocks/",
    "/baton.v1.Fleet/",
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # Two processes on one port would each get some of the connections.
    ("grpc.so_reuseport", 0),
)

_PAIR_CODEC: Codec[PrefillMessage, DecodeMessage] = Codec(prefill_to_pb, decode_from_pb)
_BLOCKS_CODEC: Codec[BlocksMessage, BlocksMessage] = Codec(blocks_to_pb, blocks_from_pb)


class RpcServer:
    """Make it inside the running event loop. Raises ConfigError without a cluster token."""

    def __init__(
        self,
        listen: str,
        token: str,
        *,
        reflect: tuple[str, ...] = (),
        tls: Certificates | FrontCertificate | None = None,
        health_listen: str = "",
    ) -> None:
        """`reflect` names the services that server reflection lists (empty: no reflection). With
        Certificates, only peers of the cluster get in; `health_listen` is then where those who have
        no certificate can ask for health, and nothing else."""
        if not token:
            raise ConfigError(
                "no cluster token: set BATON_CLUSTER_TOKEN to the same secret in every process"
            )
        self._listen = listen
        self._health = health.aio.HealthServicer()
        self._health_names = ("", *reflect)
        self._tls = tls
        self._health_listen = health_listen
        self.grpc = grpc.aio.server(
            interceptors=(*_name_check(tls), _TokenInterceptor(token), _ParseInterceptor()),
            options=list(SERVER_OPTIONS),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self._beside: grpc.aio.Server | None = None
        if reflect:
            names = (*reflect, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self.grpc)

    def add_worker(self, service: WorkerService) -> None:
        worker_pb2_grpc.add_WorkerServicer_to_server(_WorkerServicer(service), self.grpc)

    def add_handoff(self, service: HandoffService) -> None:
        handoff_pb2_grpc.add_HandoffServicer_to_server(_HandoffServicer(service), self.grpc)

    def add_blocks(self, service: BlocksService) -> None:
        blocks_pb2_grpc.add_BlocksServicer_to_server(_BlocksServicer(service), self.grpc)

    def add_fleet(self, service: FleetService) -> None:
        fleet_pb2_grpc.add_FleetServicer_to_server(_FleetServicer(service), self.grpc)

    async def start(self) -> str:
        """Listen and return `host:port` with the port that was bound. Raises ConfigError."""
        host, _, _ = self._listen.rpartition(":")
        port = _bind(self.grpc, self._listen, self._tls)
        if self._health_listen:
            self._beside = grpc.aio.server(options=list(SERVER_OPTIONS))
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._beside)
            _bind(self._beside, self._health_listen)
            await self._beside.start()
        await self.grpc.start()
        await self.set_ready(False)
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        return f"{host}:{port}"

    async def set_ready(self, ready: bool) -> None:
        """What the health service answers, for the whole server and for each public service."""
        status = health_pb2.HealthCheckResponse
        for name in self._health_names:
            await self._health.set(name, status.SERVING if ready else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, let running ones end for `grace_s` seconds, then cancel."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)
        if self._beside is not None:
            await self._beside.stop(None)


def _bind(
    server: grpc.aio.Server, listen: str, tls: Certificates | FrontCertificate | None = None
) -> int:
    """The port. Raises ConfigError."""
    try:
        if tls is None:
            return int(server.add_insecure_port(listen))
        return int(server.add_secure_port(listen, server_credentials(tls)))
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {listen}: {error}; choose another address or stop the process that "
            "uses it"
        ) from error


def _name_check(tls: Certificates | FrontCertificate | None) -> tuple[PeerNameInterceptor, ...]:
    if not isinstance(tls, Certificates):
        return ()
    return (PeerNameInterceptor(tls.config.peer_name, INTERNAL_SERVICES),)


class _TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets a call to an internal service pass only with the cluster token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        internal = handler_call_details.method.startswith(INTERNAL_SERVICES)
        if handler is None or not internal or self._admits(handler_call_details):
            return handler
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_deny)
        return grpc.unary_unary_rpc_method_handler(_deny)

    def _admits(self, details: Any) -> bool:
        given = dict(details.invocation_metadata).get("authorization", "")
        raw = given if isinstance(given, bytes) else given.encode()
        return hmac.compare_digest(raw, self._expected)


class _ParseInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Answers a request message that is no protobuf, or has text that is not UTF-8, with
    INVALID_ARGUMENT; grpc itself would answer UNKNOWN and log a traceback."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        serve = handler.unary_stream if handler.response_streaming else handler.unary_unary
        if not inspect.iscoroutinefunction(serve):
            return handler

        async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if isinstance(request, InvalidRequest):
                await _abort(context, request)
            return await serve(request, context)

        make = (
            grpc.unary_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        parse = functools.partial(_parse, handler.request_deserializer)
        return make(checked, parse, handler.response_serializer)


def _parse(parse: Callable[[bytes], Any], raw: bytes) -> Any:
    """The message, or the InvalidRequest that stands for it."""
    try:
        return parse(raw)
    except DecodeError as error:
        return InvalidRequest(f"the request is not a valid protobuf message: {error}")


async def _deny(_request: Any, context: grpc.aio.ServicerContext) -> None:
    await _abort(
        context,
        Unauthenticated("wrong cluster token: give every process the same BATON_CLUSTER_TOKEN"),
    )


async def _abort(context: grpc.aio.ServicerContext, error: BaseException) -> None:
    """End the call with the status of `error`. Always raises."""
    await context.abort(status_of(error), to_wire(error).message, trailing_metadata(error))


class _WorkerServicer(worker_pb2_grpc.WorkerServicer):  # type: ignore[misc]
    def __init__(self, service: WorkerService) -> None:
        self._service = service

    async def Link(self, _requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        codec: Codec[WorkerMessage, ConductorMessage] = Codec(
            ReportEncoder().encode, conductor_from_pb
        )
        await _serve(context, codec, self._service.link)


class _HandoffServicer(handoff_pb2_grpc.HandoffServicer):  # type: ignore[misc]
    def __init__(self, service: HandoffService) -> None:
        self._service = service

    async def Pair(self, _requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await _serve(context, _PAIR_CODEC, self._service.pair)


class _BlocksServicer(blocks_pb2_grpc.BlocksServicer):  # type: ignore[misc]
    def __init__(self, service: BlocksService) -> None:
        self._service = service

    async def Pair(self, _requests: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await _serve(context, _BLOCKS_CODEC, self._service.pair)


class _FleetServicer(fleet_pb2_grpc.FleetServicer):  # type: ignore[misc]
    def __init__(self, service: FleetService) -> None:
        self._service = service

    async def Register(  # noqa: N802
        self, request: fleet_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> fleet_pb2.FleetLease:
        async def register() -> FleetLease:
            return await self._service.register(info_from_pb(request.info))

        return lease_to_pb(await _answer(context, register))

    async def Renew(  # noqa: N802
        self, request: fleet_pb2.RenewRequest, context: grpc.aio.ServicerContext
    ) -> fleet_pb2.FleetLease:
        async def renew() -> FleetLease:
            load = load_from_pb(request.load)
            return await self._service.renew(request.name, request.incarnation, load)

        return lease_to_pb(await _answer(context, renew))

    async def Leave(  # noqa: N802
        self, request: fleet_pb2.LeaveRequest, context: grpc.aio.ServicerContext
    ) -> fleet_pb2.LeaveResponse:
        async def leave() -> None:
            await self._service.leave(request.name, request.incarnation)

        await _answer(context, leave)
        return fleet_pb2.LeaveResponse()


async def _answer(context: grpc.aio.ServicerContext, call: Callable[[], Awaitable[Out]]) -> Out:
    """Run a unary method; what it raises becomes the call's status."""
    try:
        return await call()
    except BatonError as error:
        await _abort(context, error)
        raise
    except Exception as error:
        log.exception("a unary call failed")
        await _abort(context, error)
        raise


async def _serve(
    context: grpc.aio.ServicerContext,
    codec: Codec[Out, In],
    handle: Callable[[Duplex[Out, In]], Awaitable[None]],
) -> None:
    """Run `handle` on the stream until it returns.

    grpc cancels this coroutine when the client goes, at any moment, also while it ends by itself.
    The service does not see that: it gets PeerGone from its stream, as with every other adapter,
    and has WIND_UP_S to clean up.
    """
    await context.send_initial_metadata(())  # the dialer waits for it
    closed = asyncio.Event()

    async def finish() -> None:
        closed.set()

    duplex = WireDuplex(context, codec, f"the peer at {context.peer()}", finish)
    service = asyncio.ensure_future(handle(duplex))
    pump = asyncio.create_task(duplex.run(), name="stream-pump")
    end = asyncio.create_task(closed.wait(), name="stream-end")
    try:
        await asyncio.wait({service, pump, end}, return_when=asyncio.FIRST_COMPLETED)
        if service.done():
            await duplex.aclose()  # flushes
    finally:
        duplex.lose("the stream has ended")
        await _to_its_end(_wind_up(service, pump, end))
    if not service.cancelled() and (error := service.exception()) is not None:
        log.error("a stream ended with an error", exc_info=error)
        await _abort(context, error)


async def _wind_up(service: asyncio.Future[None], *others: asyncio.Task[Any]) -> None:
    """Wait for the service to notice the end and clean up; cancel it when it does not."""
    _, late = await asyncio.wait({service}, timeout=WIND_UP_S)
    for task in late:
        log.error("a stream's service did not end within %g s of its stream", WIND_UP_S)
        task.cancel()
        await asyncio.wait({task})
    for other in others:
        other.cancel()
    await asyncio.wait(others)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that must not be cut short; a cancellation meanwhile counts afterwards."""
    task = asyncio.create_task(work, name="stream-wind-up")
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled
