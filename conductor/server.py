"""The conductor's process: both servers, and the phases in which it ends.

stop accepting -> drain (with a deadline) -> cancel what is left -> close
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from baton.errors import ConfigError, NoWorker
from baton.rpc.grpc_client import GrpcWorkerDialer
from baton.rpc.registry import Registry, open_registry
from baton.rpc.services import WorkerDialer
from baton.rpc.tls import FrontCertificate
from baton.types.registry import ConductorInfo
from baton.worker.address import reachable_address
from baton.worker.monitor import watch_loop
from conductor.announce import announce
from conductor.cluster import ConductorIdentity
from conductor.config import ConductorConfig
from conductor.exposure import warn_when_open
from conductor.http import make_app, with_direct_send
from conductor.http_protocol import BoundedHttpProtocol
from conductor.otlp import OtlpSender, check_installed
from conductor.rpc_servers import RpcServers
from conductor.service import Conductor, Policy, ServedModel
from conductor.span_export import Sender
from conductor.tenants.build import build_tenancy

CANCEL_S = 2.0  # for clean-up after running requests were cancelled
CLOSE_S = 2  # for open connections to take the last bytes
HEALTH_POLL_S = 0.2
UNREAD_S = 30.0  # how long a client may leave bytes unread before its connection is cut
BACKLOG = 2048  # connections that wait to be accepted

log = logging.getLogger(__name__)


class Server:
    """One conductor with its servers. `run` owns everything; `stop` may be called from a signal.

    `dialer` is how workers are reached, by default gRPC with the cluster token; `registry` is what
    several conductors share, by default the one of `--redis`.
    """

    def __init__(
        self,
        config: ConductorConfig,
        model: ServedModel,
        token: str,
        dialer: WorkerDialer | None = None,
        registry: Registry | None = None,
    ) -> None:
        self._config = config
        self._model = model
        self._token = token
        self._certificates = config.open_certificates()
        self._dialer = dialer or GrpcWorkerDialer(token, self._certificates)
        if registry is None and (redis := config.redis_options):
            registry = open_registry(redis)
        self._registry = registry
        self._stopping = asyncio.Event()
        self._drain_s = config.drain_timeout
        self._draining: asyncio.Timeout | None = None
        self.conductor = Conductor(
            model,
            self._dialer,
            Policy(
                lease_ttl_s=config.lease_ttl,
                max_answers=config.max_queue,
                default_deadline_s=config.default_deadline,
                routing=config.routing,
                slos=config.slos,
                map_blocks=config.prefix_map_blocks,
                planner=config.planner,
                trace_sample=config.trace_sample if config.otlp_endpoint else 0.0,
                max_prompt_tokens=config.max_prompt_tokens or None,
                max_output_tokens=config.max_output_tokens or None,
                keepalive_s=config.sse_keepalive,
            ),
            registry=registry,
            open_spans=_spans_to(config),
            make_tenancy=lambda metrics: build_tenancy(config.tenancy, registry, metrics),
        )

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self, drain_s: float | None = None) -> None:
        """Begin to end; a later call may shorten the drain time (seconds from now)."""
        if drain_s is not None:
            self._drain_s = min(self._drain_s, drain_s)
            if self._draining is not None:
                self._draining.reschedule(asyncio.get_running_loop().time() + drain_s)
        self._stopping.set()

    async def run(self, on_listening: Callable[[ConductorIdentity], None]) -> None:
        """Serve until `stop`. `on_listening` is told the addresses. Raises ConfigError."""
        config, conductor = self._config, self.conductor
        await conductor.tenancy.directory.load()
        warn_when_open(config)
        front = None
        if config.ssl_certfile:
            front = FrontCertificate(config.ssl_certfile, config.ssl_keyfile)
        conductor.metrics.certificates.follow("internal", self._certificates)
        conductor.metrics.certificates.follow("public", front)
        rpc = RpcServers(config, conductor, self._token, self._certificates, front)
        with listen(config.host, config.port) as listener:
            identity = self._identify(listener, *await rpc.start())
            app = make_app(conductor, identity, config.max_body_bytes, config.private_status)
            http = _HttpServer(with_direct_send(app), front)
            try:
                async with asyncio.TaskGroup() as tasks:
                    core = tasks.create_task(conductor.run(), name="conductor")
                    serving = tasks.create_task(http.serve([listener]), name="http")
                    health = tasks.create_task(self._follow_health(rpc), name="health")
                    await http.listening.wait()
                    on_listening(identity)
                    lease = tasks.create_task(self._announce(identity), name="lease")
                    lag = tasks.create_task(watch_loop(conductor.metrics.loop_lag), name="loop lag")
                    await self._stopping.wait()
                    lease.cancel()
                    lag.cancel()
                    await self._drain()
                    log.info("closing")
                    self.conductor.live.close()
                    http.should_exit = True
                    await serving
                    health.cancel()
                    core.cancel()
            finally:
                await rpc.stop(CLOSE_S)
                await conductor.tenancy.aclose()
                if self._registry is not None:
                    await self._registry.aclose()

    async def _announce(self, identity: ConductorIdentity) -> None:
        if self._registry is None:
            return
        advertise = self._config.advertise
        info = ConductorInfo(
            name=identity.name,
            incarnation=identity.incarnation,
            http=reachable_address(advertise, identity.http),
            grpc=reachable_address(advertise, identity.for_workers),
        )
        await announce(
            self._registry, info, self._config.lease_ttl, self.conductor.records.tell_again
        )

    async def _drain(self) -> None:
        admission = self.conductor.admission
        log.info("stopping: no new requests; running=%d", self.conductor.running)
        admission.close()
        if await self._drained():
            return
        log.warning("cancelling %d requests after the drain time", self.conductor.running)
        self.conductor.abort_all(NoWorker("the conductor was shut down during the request"))
        try:
            async with asyncio.timeout(CANCEL_S):
                await admission.wait_idle()
        except TimeoutError:
            log.warning("%d requests did not end", self.conductor.running)

    async def _drained(self) -> bool:
        """Whether everything has ended within the drain time, which `stop` may shorten."""
        try:
            async with asyncio.timeout(self._drain_s) as self._draining:
                await self.conductor.admission.wait_idle()
        except TimeoutError:
            return False
        finally:
            self._draining = None
        return True

    async def _follow_health(self, rpc: RpcServers) -> None:
        said: bool | None = None
        while True:
            if self.conductor.ready is not said:
                said = self.conductor.ready
                await rpc.set_ready(said)
            await asyncio.sleep(HEALTH_POLL_S)

    def _identify(
        self, listener: socket.socket, grpc_address: str, for_workers: str
    ) -> ConductorIdentity:
        config = self._config
        return ConductorIdentity(
            name=config.name,
            pid=os.getpid(),
            incarnation=self.conductor.incarnation,
            http=f"{config.host}:{listener.getsockname()[1]}",
            grpc=grpc_address,
            for_workers=for_workers,
            scheme="https" if config.ssl_certfile else "http",
            started_s=time.time(),
        )


def _spans_to(config: ConductorConfig) -> Callable[[], Sender] | None:
    """How to connect to the collector, when there is one. Raises ConfigError."""
    if not config.otlp_endpoint:
        return None
    check_installed()
    return partial(OtlpSender, config.otlp_endpoint, config.cluster_name, config.name)


class _HttpServer(uvicorn.Server):
    """uvicorn without its signal handlers: the process decides when to end."""

    def __init__(self, app: ASGIApp, front: FrontCertificate | None = None) -> None:
        self.listening = asyncio.Event()
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHttpProtocol,  # httptools: a token costs 6 µs less than with h11
                lifespan="off",
                backlog=BACKLOG,
                access_log=False,
                log_config=None,
                log_level="warning",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=CLOSE_S,
                ssl_context_factory=(lambda *_: front.context) if front else None,
            )
        )

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


def listen(host: str, port: int) -> socket.socket:
    """A socket for HTTP. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Says TCP: only then asyncio turns Nagle's algorithm off for what it accepts, which would hold
    # the first token back until a client acknowledges the headers (40 ms).
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What it accepts inherits this. The kernel also cuts off a client that is there but has
        # stopped reading, and the request ends with it: nothing else would before its deadline.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNREAD_S * 1000))
        listener.bind((host, port))
        listener.listen(BACKLOG)  # only this, not binding, notices a port that somebody listens on
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port "
            "or --host"
        ) from error
    return listener
