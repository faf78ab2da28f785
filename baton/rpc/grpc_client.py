"""Calling other processes over gRPC: the dialers and the fleet client.

Every call has a deadline and carries the cluster token. Failures arrive as baton errors: what the
peer said, or PeerGone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc

from baton.errors import BatonError, PeerGone
from baton.rpc.codec_blocks import blocks_from_pb, blocks_to_pb
from baton.rpc.codec_fleet import info_to_pb, lease_from_pb, load_to_pb
from baton.rpc.codec_handoff import decode_to_pb, prefill_from_pb
from baton.rpc.codec_link import conductor_to_pb
from baton.rpc.codec_report import ReportDecoder
from baton.rpc.errors import from_status
from baton.rpc.grpc_stream import Codec, WireDuplex
from baton.rpc.grpc_tls import hint, make_channel
from baton.rpc.services import Duplex
from baton.rpc.tls import Certificates
from baton.types.blocks import BlocksMessage
from baton.types.fleet import FleetLease, WorkerInfo, WorkerLoad
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.link import ConductorMessage, WorkerMessage
from baton.v1 import fleet_pb2
from baton.v1.blocks_pb2_grpc import BlocksStub
from baton.v1.fleet_pb2_grpc import FleetStub
from baton.v1.handoff_pb2_grpc import HandoffStub
from baton.v1.worker_pb2_grpc import WorkerStub

Out = TypeVar("Out")
In = TypeVar("In")

HALF_CLOSE_S = 2.0  # how long the server may take to end its side after we ended ours
MAX_MESSAGE_BYTES = 64 << 20

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that is stopped, or whose host vanished without a TCP reset, is noticed within 15 s.
    # (Newer versions of gRPC follow the ping timeout, which is a minute otherwise.)
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),  # else pings stop on a stream that is quiet
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A new channel makes a new connection, whatever an older one to the address went through.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)

_PAIR_CODEC: Codec[DecodeMessage, PrefillMessage] = Codec(decode_to_pb, prefill_from_pb)
_BLOCKS_CODEC: Codec[BlocksMessage, BlocksMessage] = Codec(blocks_to_pb, blocks_from_pb)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that internal services require."""
    return (("authorization", f"Bearer {token}"),)


class GrpcWorkerDialer:
    """`WorkerDialer` over gRPC."""

    def __init__(self, token: str, tls: Certificates | None = None) -> None:
        self._token = token
        self._tls = tls

    async def link(self, address: str, timeout_s: float) -> Duplex[ConductorMessage, WorkerMessage]:
        channel = make_channel(address, CHANNEL_OPTIONS, self._tls)
        call = WorkerStub(channel).Link(metadata=bearer(self._token))
        codec: Codec[ConductorMessage, WorkerMessage] = Codec(
            conductor_to_pb, ReportDecoder().decode
        )
        return await _open(channel, call, codec, address, timeout_s, self._tls)


class GrpcHandoffDialer:
    """`HandoffDialer` over gRPC."""

    def __init__(self, token: str, tls: Certificates | None = None) -> None:
        self._token = token
        self._tls = tls

    async def pair(self, address: str, timeout_s: float) -> Duplex[DecodeMessage, PrefillMessage]:
        channel = make_channel(address, CHANNEL_OPTIONS, self._tls)
        call = HandoffStub(channel).Pair(metadata=bearer(self._token))
        return await _open(channel, call, _PAIR_CODEC, address, timeout_s, self._tls)


class GrpcBlocksDialer:
    """`BlocksDialer` over gRPC."""

    def __init__(self, token: str, tls: Certificates | None = None) -> None:
        self._token = token
        self._tls = tls

    async def pair(self, address: str, timeout_s: float) -> Duplex[BlocksMessage, BlocksMessage]:
        channel = make_channel(address, CHANNEL_OPTIONS, self._tls)
        call = BlocksStub(channel).Pair(metadata=bearer(self._token))
        return await _open(channel, call, _BLOCKS_CODEC, address, timeout_s, self._tls)


class GrpcFleetClient:
    """`FleetService` over gRPC: how a worker talks to the conductor. Call `aclose` at the end.

    Make it inside the running event loop. Calls raise what the conductor raised, or PeerGone when
    it did not answer within `timeout_s` seconds.
    """

    def __init__(
        self,
        address: str,
        token: str,
        timeout_s: float = 5.0,
        tls: Certificates | None = None,
    ) -> None:
        self._address = address
        self._metadata = bearer(token)
        self._timeout_s = timeout_s
        self._tls = tls
        self._shown = tls and tls.current()
        self._channel = make_channel(address, CHANNEL_OPTIONS, tls)
        self._before: grpc.aio.Channel | None = None
        self._stub = FleetStub(self._channel)

    async def register(self, info: WorkerInfo) -> FleetLease:
        request = fleet_pb2.RegisterRequest(info=info_to_pb(info))
        return lease_from_pb(await self._call((await self._fleet()).Register, request))

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        request = fleet_pb2.RenewRequest(name=name, incarnation=incarnation, load=load_to_pb(load))
        return lease_from_pb(await self._call((await self._fleet()).Renew, request))

    async def leave(self, name: str, incarnation: str) -> None:
        request = fleet_pb2.LeaveRequest(name=name, incarnation=incarnation)
        await self._call((await self._fleet()).Leave, request)

    async def aclose(self) -> None:
        for channel in (self._channel, self._before):
            if channel is not None:
                await channel.close()

    async def _call(self, method: Callable[..., Awaitable[Any]], request: object) -> Any:
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _explain(error, f"the conductor at {self._address}", self._tls) from error

    async def _fleet(self) -> FleetStub:
        """Of a channel that shows the certificate of now: it keeps the one that it was made with,
        and lives as long as the process. The channel before is kept for calls under way."""
        if self._tls is None or (current := self._tls.current()) is self._shown:
            return self._stub
        self._shown = current
        ended, self._before = self._before, self._channel
        self._channel = make_channel(self._address, CHANNEL_OPTIONS, self._tls)
        self._stub = FleetStub(self._channel)
        if ended is not None:
            await ended.close()
        return self._stub


async def _open(
    channel: grpc.aio.Channel,
    call: Any,
    codec: Codec[Out, In],
    address: str,
    timeout_s: float,
    tls: Certificates | None,
) -> Duplex[Out, In]:
    """Wait until the server has accepted the stream (it answers with headers at once)."""
    try:
        async with asyncio.timeout(timeout_s):
            await call.initial_metadata()
        if call.done():
            await call.read()  # raises the status
    except BaseException as error:
        call.cancel()
        await channel.close()
        raise _dial_error(error, address, timeout_s, tls) from error
    stream = _DialedStream(channel, call, codec, address)
    stream.start()
    return stream


def _dial_error(
    error: BaseException, address: str, timeout_s: float, tls: Certificates | None
) -> BaseException:
    if isinstance(error, grpc.aio.AioRpcError):
        return _explain(error, f"the worker at {address}", tls)
    if isinstance(error, TimeoutError):
        return PeerGone(f"the worker at {address} did not answer within {timeout_s:g} s")
    return error


def _explain(error: grpc.aio.AioRpcError, peer: str, tls: Certificates | None) -> BatonError:
    """What the failure stands for, with what it may have to do with TLS."""
    known = from_status(error, peer)
    meaning = hint(error.details() or "", tls) if isinstance(known, PeerGone) else ""
    return PeerGone(f"{known.message} ({meaning})") if meaning else known


class _DialedStream(WireDuplex[Out, In]):
    """A stream that owns its channel and its pump; `aclose` ends both."""

    def __init__(
        self, channel: grpc.aio.Channel, call: Any, codec: Codec[Out, In], address: str
    ) -> None:
        super().__init__(call, codec, f"the worker at {address}", call.done_writing)
        self._channel = channel
        self._call = call
        self._pump: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._pump = asyncio.create_task(self.run(), name="stream-pump")

    async def aclose(self) -> None:
        """Flush, end our side, give the server a moment to end its own, then cut: at once when
        cancelled."""
        try:
            await super().aclose()
            if self._pump is not None:
                await asyncio.wait([self._pump], timeout=HALF_CLOSE_S)
        finally:
            self._call.cancel()
            if self._pump is not None:
                self._pump.cancel()
                await asyncio.wait([self._pump])
            await self._channel.close()
