"""A worker process from its first to its last moment.

    load -> listen -> register -> serve      SIGTERM -> stop accepting -> drain -> cancel -> close

Every phase after the signal has a deadline; a second signal skips the draining.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from baton.errors import BatonError, ConfigError, WorkerLost
from baton.rpc.grpc_client import GrpcFleetClient
from baton.rpc.grpc_server import RpcServer
from baton.rpc.membership import Membership
from baton.telemetry import setup_logging
from baton.types.fleet import Role, WorkerLoad
from baton.worker.build import WorkerParts, build, worker_name
from baton.worker.config import WorkerConfig, reachable_address
from baton.worker.lifecycle import StopSignals, exit_now
from baton.worker.links import LinkServer

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "BATON_CLUSTER_TOKEN"
SERVER_GRACE_S = 3.0
CLOSE_TIMEOUT_S = 10.0


class Service(Protocol):
    """A prefill or decode service over an engine of its own."""

    links: LinkServer

    def serve_on(self, server: RpcServer) -> None:
        """Add the gRPC services. Before the server starts."""

    async def run(self) -> None:
        """Until `aclose`. Raises when the engine cannot go on."""

    async def aclose(self) -> None:
        """Send what is left, end all streams, and let `run` return."""

    def load(self) -> WorkerLoad: ...


def main(config: WorkerConfig, role: Role, make: Callable[[WorkerParts], Service]) -> None:
    """Run the worker and end the process: 0 after an orderly shutdown, 1 after a failure, 2 when
    the configuration is wrong."""
    setup_logging(config.log_level, worker_name(config, role))
    try:
        asyncio.run(_run(config, role, make))
    except ConfigError as error:
        log.error("%s", error.message)
        exit_now(2)
    except BatonError as error:
        log.error("%s: %s", error.code, error.message)
        exit_now(1)
    except Exception:
        log.exception("the worker failed")
        exit_now(1)
    exit_now(0)


def cluster_token() -> str:
    """Raises ConfigError when there is none."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ConfigError(f"set {TOKEN_VARIABLE} to the same secret in every process")
    return token


async def _run(config: WorkerConfig, role: Role, make: Callable[[WorkerParts], Service]) -> None:
    if not config.conductor:
        raise ConfigError("--conductor host:port is missing: a worker serves a conductor")
    cluster_token()
    signals = StopSignals()
    signals.install()
    parts = await _unless_stopped(build(config, role), signals)
    try:
        await _serve(config, role, parts, make(parts), signals)
    except BaseExceptionGroup as group:
        raise _first_leaf(group) from group
    finally:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await parts.close()


async def _unless_stopped(
    start: Coroutine[Any, Any, WorkerParts], signals: StopSignals
) -> WorkerParts:
    """Ends the process when it was told to stop first: nothing can interrupt the loading."""
    loading = asyncio.create_task(start, name="load")
    stopped = asyncio.create_task(signals.stop.wait(), name="stop")
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        log.info("stopped while starting")
        exit_now(0)
    return loading.result()


async def _serve(
    config: WorkerConfig, role: Role, parts: WorkerParts, service: Service, signals: StopSignals
) -> None:
    token = cluster_token()
    server = RpcServer(config.listen, token)
    service.serve_on(server)
    address = reachable_address(config.advertise, await server.start())
    fleet = GrpcFleetClient(config.conductor, token)
    membership = Membership(fleet, parts.info(role, address), service.load)
    log.info("listening address=%s role=%s pid=%d", address, role, os.getpid())
    try:
        async with asyncio.TaskGroup() as group:
            serving = group.create_task(service.run(), name="service")
            member = group.create_task(membership.run(), name="membership")
            ready = group.create_task(_mark_ready(membership, server), name="readiness")
            await signals.stop.wait()
            log.info("stopping: accepting no more requests")
            service.links.drain()
            await server.set_ready(False)
            ready.cancel()
            if not membership.registered.is_set():
                member.cancel()
            await membership.leave()
            await _drain(service.links, config.drain_timeout, signals)
            member.cancel()
            log.info("stopping: closing")
            await service.aclose()
            await asyncio.wait([serving], timeout=CLOSE_TIMEOUT_S)
            serving.cancel()
    finally:
        await server.stop(SERVER_GRACE_S)
        await fleet.aclose()


async def _mark_ready(membership: Membership, server: RpcServer) -> None:
    await membership.registered.wait()
    await server.set_ready(True)


async def _drain(links: LinkServer, timeout_s: float, signals: StopSignals) -> None:
    """Let running attempts end; then end them with an error that lets conductors retry."""
    log.info("stopping: draining for at most %g s", timeout_s)
    idle = asyncio.create_task(links.wait_idle(), name="idle")
    hurry = asyncio.create_task(signals.hurry.wait(), name="hurry")
    await asyncio.wait({idle, hurry}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    if not idle.done():
        log.warning("stopping: cancelling what is still running")
    links.abandon(WorkerLost("the worker was shut down before the answer was complete"))
    for task in (idle, hurry):
        task.cancel()
    await asyncio.wait({idle, hurry})


def _first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that ended a task group; the others followed from it."""
    first = group.exceptions[0]
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first
