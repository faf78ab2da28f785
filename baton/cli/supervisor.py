"""Starts the processes of a cluster in order, keeps the workers alive, and ends them in order.

start:  conductors --(announce their ports)--> workers --(register)--> ready
stop:   drain (conductors finish their requests) -> stop workers -> kill what is left
"""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from baton.child import Child, ChildSpec
from baton.cli.report import Reporter
from baton.client.http import Client
from baton.errors import BatonError
from baton.rpc.tls import trusting_only
from baton.stopping import Interrupted, Result, unless

_POLL_S = 0.1
_STABLE_S = 60.0  # a process that lived this long starts again at once and with a clean record
_MAX_RESTARTS = 5  # in a row
_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0
_WORKER_GRACE_S = 10.0
_CLOSE_GRACE_S = 5.0  # what the conductor may take beyond the drain that it does itself


class StartFailed(BatonError):
    """A process of the cluster did not start, or ended and could not be kept alive."""

    code = "start_failed"


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the conductor listens, as `host:port`, for clients and for workers, and where `more` of
    them do."""

    http: str
    grpc: str
    more: tuple[Addresses, ...] = ()
    for_workers: str = ""  # empty: at `grpc`
    scheme: str = "http"

    @property
    def all(self) -> tuple[Addresses, ...]:
        return (self, *self.more)

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.http}"

    @property
    def urls(self) -> str:
        """Of all, as `--url` takes them."""
        return ",".join(each.url for each in self.all)

    @property
    def grpcs(self) -> str:
        """Of all, for clients."""
        return ",".join(each.grpc for each in self.all)

    @property
    def all_for_workers(self) -> str:
        """Of all, as workers take them."""
        return ",".join(each.for_workers or each.grpc for each in self.all)


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What to start. The makers get addresses: what they return may depend on them.

    `conductor(None)` is the first start; later ones get the addresses to listen on again. The same
    holds for `more_conductors`.
    """

    conductor: Callable[[Addresses | None], ChildSpec]
    workers: Callable[[Addresses], Sequence[ChildSpec]]
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    more_conductors: Sequence[Callable[[Addresses | None], ChildSpec]] = ()
    ssl_certfile: str = ""  # what conductors show their clients; empty: no TLS

    def trusted(self) -> ssl.SSLContext | None:
        """For clients on this machine: that certificate, because the name by which a conductor is
        reached from here may not be in it. Raises ConfigError."""
        return trusting_only(self.ssl_certfile) if self.ssl_certfile else None


@dataclass(slots=True)
class _Process:
    make: Callable[[], ChildSpec]
    child: Child
    failures: int = 0


@dataclass(slots=True)
class Supervisor:
    """One cluster. `run` is called once; it returns when everything has ended."""

    plan: ClusterPlan
    reporter: Reporter
    _processes: dict[str, _Process] = field(default_factory=dict)
    _listening: dict[str, Addresses] = field(default_factory=dict)  # by conductor
    _live: set[str] = field(default_factory=set)  # workers, while it starts
    _ready: bool = False
    _stopping: bool = False
    _failure: BatonError | None = None
    # Set by a signal or a failure: whatever waits stops waiting.
    _interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    # Set by a second signal: nothing is waited for any more.
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, when_ready: Callable[[Addresses], Awaitable[None]]) -> None:
        """Start everything, await `when_ready`, serve until a signal, stop everything.

        Raises StartFailed with the last lines of the process that is to blame.
        """
        with self._signals():
            async with asyncio.TaskGroup() as group:
                try:
                    addresses = await self._start(group)
                    self._ready = True
                    await self._unless_interrupted(when_ready(addresses))
                    await self._interrupted.wait()
                except Interrupted:
                    pass
                except BatonError as error:
                    self._fail(error)
                finally:
                    await self._stop()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let `run` drain, stop everything and return."""
        self._interrupted.set()

    async def _start(self, group: asyncio.TaskGroup) -> Addresses:
        first = await self._start_conductor(group, self.plan.conductor)
        more = [await self._start_conductor(group, make) for make in self.plan.more_conductors]
        addresses = replace(first, more=tuple(more))
        names = []
        for spec in self.plan.workers(addresses):
            self._spawn(group, lambda spec=spec: spec)  # type: ignore[misc]
            self.reporter.step(spec.name, "starting")
            names.append(spec.name)
        try:
            async with asyncio.timeout(self.plan.start_timeout_s):
                for each in addresses.all:
                    await self._unless_interrupted(self._all_live(each, names))
        except TimeoutError:
            raise StartFailed(
                f"the cluster was not ready after {self.plan.start_timeout_s:.0f} s; "
                "look at its logs with --verbose, or give it longer with --start-timeout"
            ) from None
        return addresses

    async def _start_conductor(
        self, group: asyncio.TaskGroup, make: Callable[[Addresses | None], ChildSpec]
    ) -> Addresses:
        name = make(None).name
        conductor = self._spawn(group, lambda: make(self._listening.get(name)))
        self.reporter.step(name, "starting")
        try:
            said = await self._unless_interrupted(conductor.announcement(self.plan.start_timeout_s))
        except TimeoutError:
            what = (
                f"did not say its address within {self.plan.start_timeout_s:g} s; give it longer "
                "with --start-timeout"
            )
            raise self._blame(name, conductor, what) from None
        addresses = Addresses(
            _local(said["http"]),
            _local(said["grpc"]),
            for_workers=_local(said.get("for_workers") or said["grpc"]),
            scheme="https" if self.plan.ssl_certfile else "http",
        )
        self._listening[name] = addresses
        self.reporter.step(name, f"listening on {addresses.http}", done=True, pid=conductor.pid)
        return addresses

    def _spawn(self, group: asyncio.TaskGroup, make: Callable[[], ChildSpec]) -> Child:
        process = _Process(make, Child(make(), self.reporter.log))
        name = process.child.spec.name
        self._processes[name] = process
        group.create_task(self._keep(name, process), name=name)
        return process.child

    async def _all_live(self, addresses: Addresses, names: Sequence[str]) -> None:
        """Return once every named worker is live and the conductor says that it is ready."""
        missing = set(names)
        async with self._client(addresses.url) as client:
            while missing or not await client.ready():
                for worker in await self._workers(client):
                    if worker.get("state") == "live" and worker.get("name") in missing:
                        missing.remove(worker["name"])
                        self._say_live(worker)
                await asyncio.sleep(_POLL_S)

    def _client(self, urls: str) -> Client:
        return Client(urls, timeout_s=10.0, tls=self.plan.trusted())

    def _say_live(self, worker: dict[str, Any]) -> None:
        """Once, however many conductors know it."""
        name = str(worker["name"])
        if name not in self._live:
            self._live.add(name)
            self.reporter.step(name, "live", done=True, pid=worker.get("pid"))

    async def _workers(self, client: Client) -> list[dict[str, Any]]:
        try:
            cluster = await client.cluster()
            return [*(cluster.get("workers") or ()), *(cluster.get("stores") or ())]
        except BatonError:  # the conductor is busy or restarting; the deadline is our caller's
            return []

    async def _keep(self, name: str, process: _Process) -> None:
        """Run one process, again when it dies, until the supervisor stops or gives up."""
        clock = asyncio.get_running_loop().time
        while not self._stopping:
            started = clock()
            code = await self._run_once(name, process.child)
            if self._stopping:
                return
            process.failures = 1 if clock() - started > _STABLE_S else process.failures + 1
            if not self._ready or process.failures > _MAX_RESTARTS:
                self._fail(self._blame(name, process.child, _ending(code)))
                return
            delay = min(_BACKOFF_S * 2 ** (process.failures - 1), _MAX_BACKOFF_S)
            self.reporter.event(
                "process_exited",
                f"{name} {_ending(code)}; starting it again in {delay:.1f} s",
                name=name,
                code=code,
            )
            await self._sleep(delay)
            process.child = Child(process.make(), self.reporter.log)

    async def _run_once(self, name: str, child: Child) -> int:
        """One life. Who was told that it died hears when it is live again."""
        if not self._ready:
            return await child.run()
        saying = asyncio.create_task(self._say_live_again(name, child), name=f"{name} again")
        try:
            return await child.run()
        finally:
            saying.cancel()
            await asyncio.wait([saying])

    async def _say_live_again(self, name: str, child: Child) -> None:
        """A conductor when it listens, a worker when a conductor knows this life of it."""
        with suppress(TimeoutError):
            if name in self._listening:
                await child.announcement(self.plan.start_timeout_s)
            else:
                async with asyncio.timeout(self.plan.start_timeout_s):
                    await self._known(name, child)
            self.reporter.event("process_live", f"{name} is live again", name=name, pid=child.pid)

    async def _known(self, name: str, child: Child) -> None:
        urls = ",".join(each.url for each in self._listening.values())
        async with self._client(urls) as client:
            while True:
                workers = await self._workers(client)
                lives = [(each.get("name"), each.get("pid"), each.get("state")) for each in workers]
                if (name, child.pid, "live") in lives:
                    return
                await asyncio.sleep(_POLL_S)

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not longer than the supervisor runs."""
        try:
            async with asyncio.timeout(seconds):
                await self._interrupted.wait()
        except TimeoutError:
            return

    async def _stop(self) -> None:
        self._stopping = True
        self.reporter.settle()
        children = [process.child for process in self._processes.values()]
        count = 1 + len(self.plan.more_conductors)  # they are started first
        conductors, workers = children[:count], children[count:]
        if self._ready and self._failure is None:
            self.reporter.event("draining", "draining: running requests finish", phase="drain")
        grace_s = 1.0 if self._failure else self.plan.drain_timeout_s + _CLOSE_GRACE_S
        await asyncio.gather(*(each.stop(grace_s, self._hurry) for each in conductors))
        self.reporter.event("stopping", "stopping the workers", phase="stop workers")
        ended = await asyncio.gather(
            *(worker.stop(_WORKER_GRACE_S, self._hurry) for worker in workers)
        )
        killed = [w.spec.name for w, by_itself in zip(workers, ended, strict=True) if not by_itself]
        text = f"stopped (killed: {', '.join(killed)})" if killed else "stopped"
        self.reporter.event("stopped", text, killed=killed)

    async def _unless_interrupted(self, work: Awaitable[Result]) -> Result:
        return await unless(self._interrupted, work, lambda: self._failure)

    def _fail(self, error: BatonError) -> None:
        self._failure = self._failure or error
        self._interrupted.set()

    def _blame(self, name: str, child: Child, what: str) -> StartFailed:
        lines = "".join(f"\n  {line}" for line in child.tail)
        return StartFailed(f"{name} {what}{':' if lines else '; it wrote nothing'}{lines}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._interrupted.is_set():
            self._hurry.set()
        self._interrupted.set()


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _local(address: str) -> str:
    """The address as processes of this machine reach it."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]", "::", "") else address
