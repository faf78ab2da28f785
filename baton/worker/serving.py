"""A registered process from its first to its last moment: workers and stores alike. No torch.

    listen -> register -> serve      SIGTERM -> stop accepting -> drain -> cancel -> close

Every phase after the signal has a deadline; a second signal skips the draining. A worker that is
asked to take another role ends in the same way, and `lives.py` begins its next life.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from baton.errors import BatonError, ConfigError, WorkerLost, WorkerMoved
from baton.logs import setup_logging
from baton.rpc.grpc_client import GrpcFleetClient
from baton.rpc.grpc_server import RpcServer
from baton.rpc.registry import Registry, open_registry
from baton.rpc.tls import Certificates, shown_to_scrapers
from baton.types.fleet import Role, WorkerInfo, WorkerLoad
from baton.worker.address import reachable_address
from baton.worker.conductors import ConductorSet
from baton.worker.lifecycle import StopSignals, exit_now
from baton.worker.links import LinkServer
from baton.worker.member_metrics import MemberMetrics
from baton.worker.member_options import MemberOptions
from baton.worker.monitor import monitored

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "BATON_CLUSTER_TOKEN"
SERVER_GRACE_S = 3.0
MOVE_S = 2.0  # that answers get to end by themselves before they move with the role of their worker
CLOSE_TIMEOUT_S = 10.0


class Service(Protocol):
    """What the process is for: prefill, decode, or keeping blocks."""

    links: LinkServer

    def serve_on(self, server: RpcServer) -> None:
        """Add the gRPC services. Before the server starts."""

    async def run(self) -> None:
        """Until `aclose`. Raises when it cannot go on."""

    async def wait_idle(self) -> None:
        """Return when nobody waits for it any more. The caller has the deadline."""

    async def aclose(self) -> None:
        """Send what is left, end all streams, and let `run` return."""

    def load(self) -> WorkerLoad: ...


class Member(Protocol):
    """A place in the fleet of one conductor (Membership) or several (ConductorSet)."""

    registered: asyncio.Event

    async def run(self) -> None:
        """Until cancelled."""

    async def leave(self) -> None: ...


def cluster_token() -> str:
    """Raises ConfigError when there is none."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ConfigError(f"set {TOKEN_VARIABLE} to the same secret in every process")
    return token


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process serves, and whom: conductors at `host:port`, and those in the registry."""

    conductors: tuple[str, ...]
    registry: Registry | None
    listen: str
    advertise: str
    drain_timeout_s: float
    tls: Certificates | None = None
    health_listen: str = ""  # where probes get in that have no certificate; empty: nowhere

    @classmethod
    def of(cls, options: MemberOptions) -> Place:
        """Raises ConfigError when there is no way to find a conductor."""
        redis = options.redis_options
        if not options.conductor and redis is None:
            raise ConfigError("--conductor host:port is missing (or --redis, to find conductors)")
        return cls(
            options.conductor,
            open_registry(redis) if redis else None,
            options.listen,
            options.advertise,
            options.drain_timeout,
            options.open_certificates(),
            options.health_listen,
        )

    async def aclose(self) -> None:
        """When no life of the process follows."""
        if self.registry is not None:
            await self.registry.aclose()


@asynccontextmanager
async def begun(
    options: MemberOptions, metrics: MemberMetrics
) -> AsyncIterator[tuple[Place, StopSignals]]:
    """What comes before anything that takes long: what is missing is said at once, signals are
    heeded, and `metrics` can be scraped. Raises ConfigError."""
    place = Place.of(options)
    cluster_token()
    signals = StopSignals()
    signals.install()
    metrics.certificates.follow("internal", place.tls)
    async with monitored(
        options.listen,
        options.metrics_port,
        metrics.own.render_for,
        metrics.loop_lag,
        shown_to_scrapers(options.metrics_tls, place.tls),
    ):
        yield place, signals


def run_process(name: str, log_level: str, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` and end the process: 0 when it returns, 1 when it fails, 2 when the configuration
    is wrong."""
    setup_logging(log_level, name)
    try:
        asyncio.run(work)
    except ConfigError as error:
        log.error("%s", error.message)
        exit_now(2)
    except BatonError as error:
        log.error("%s: %s", error.code, error.message)
        exit_now(1)
    except Exception:
        log.exception("%s failed", name)
        exit_now(1)
    exit_now(0)


async def serve(
    place: Place, info: Callable[[str], WorkerInfo], service: Service, signals: StopSignals
) -> Role | None:
    """Until the stop signal, or until a conductor wants the worker in another role, which is
    returned. `info` makes the registration from the address that was bound."""
    try:
        return await _serve(place, info, service, signals)
    except BaseExceptionGroup as group:
        raise _first_leaf(group) from group


async def _serve(
    place: Place, info: Callable[[str], WorkerInfo], service: Service, signals: StopSignals
) -> Role | None:
    token = cluster_token()
    server = RpcServer(place.listen, token, tls=place.tls, health_listen=place.health_listen)
    service.serve_on(server)
    registration = info(reachable_address(place.advertise, await server.start()))
    conductors = ConductorSet(
        place.conductors,
        place.registry,
        lambda address: GrpcFleetClient(address, token, tls=place.tls),
        registration,
        service.load,
    )
    log.info(
        "listening address=%s role=%s pid=%d", registration.address, registration.role, os.getpid()
    )
    try:
        ready, drain_s = server.set_ready, place.drain_timeout_s
        return await live(service, conductors, ready, drain_s, signals)
    finally:
        await server.stop(SERVER_GRACE_S)
        await conductors.aclose()


async def live(
    service: Service,
    membership: Member,
    set_ready: Callable[[bool], Awaitable[None]],
    drain_timeout_s: float,
    signals: StopSignals,
) -> Role | None:
    """From the start of the service to its end after the stop signal, or when it is to be another
    one, whose role is returned."""
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(service.run(), name="service")
        member = group.create_task(membership.run(), name="membership")
        ready = group.create_task(_mark_ready(membership, set_ready), name="readiness")
        await _wait_for_end(service.links, signals)
        log.info("stopping: accepting no more requests")
        service.links.drain()
        await set_ready(False)
        ready.cancel()
        if not membership.registered.is_set():
            member.cancel()
        await membership.leave()
        moving = service.links.wanted_role is not None and not signals.stop.is_set()
        await _drain(service, drain_timeout_s, signals, moving)
        member.cancel()
        log.info("stopping: closing")
        await service.aclose()
        await asyncio.wait([serving], timeout=CLOSE_TIMEOUT_S)
        serving.cancel()
    return None if signals.stop.is_set() else service.links.wanted_role


async def _wait_for_end(links: LinkServer, signals: StopSignals) -> None:
    stop = asyncio.create_task(signals.stop.wait(), name="stop")
    switch = asyncio.create_task(links.role_wanted.wait(), name="switch")
    try:
        await asyncio.wait({stop, switch}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        switch.cancel()
    if links.wanted_role is not None:
        log.info("a conductor wants this worker to %s", links.wanted_role)


async def _mark_ready(membership: Member, set_ready: Callable[[bool], Awaitable[None]]) -> None:
    await membership.registered.wait()
    await set_ready(True)


async def _drain(service: Service, timeout_s: float, signals: StopSignals, moving: bool) -> None:
    """Let running attempts end; then end them with an error that lets conductors retry. When the
    worker is `moving` to another role, only prompts may take their time: answers go on elsewhere.
    """
    log.info("stopping: draining for at most %g s", timeout_s)
    idle = asyncio.create_task(service.wait_idle(), name="idle")
    hurry = asyncio.create_task(signals.hurry.wait(), name="hurry")
    now = asyncio.get_running_loop().time
    until = now() + timeout_s
    while not (idle.done() or hurry.done()) and (left_s := until - now()) > 0:
        wait_s = min(left_s, MOVE_S) if moving else left_s
        await asyncio.wait({idle, hurry}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if moving:  # again and again: what waited for its KV decodes later
            service.links.abandon_decodes(WorkerMoved("the worker takes another role"))
    if not idle.done():
        log.warning("stopping: cancelling what is still running")
    service.links.abandon(WorkerLost("the worker was shut down before the answer was complete"))
    for task in (idle, hurry):
        task.cancel()
    await asyncio.wait({idle, hurry})


def _first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended a task group; the others followed from it."""
    first = group.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
