"""The cluster under test: 2P2D, a store, two conductors and Redis, each a process of its own."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from baton.client.http import Client
from baton.errors import BatonError
from baton.rpc.grpc_client import GrpcWorkerDialer
from baton.rpc.redis_options import RedisOptions
from baton.rpc.registry import open_registry
from baton.types.fleet import WorkerLoad
from baton.types.link import StepReport
from bench.chaos.processes import ChaosFailed, Command, Kept, pids_with
from bench.chaos.waiting import until
from bench.ports import free_port

START_S = 240.0
ASK_S = 2.0  # how long one look at a process may take
_GONE_S = 10.0
_CLUSTER_NAME = "chaos"


@dataclass(frozen=True, slots=True)
class Shape:
    """`lease_ttl_s`: of workers at conductors, of conductors in Redis, and of handoffs."""

    prefill: int = 2
    decode: int = 2
    conductors: int = 2
    lease_ttl_s: float = 3.0
    dtype: str = "auto"
    drain_timeout_s: float = 30.0
    kv_mib: int = 48
    store_mib: int = 64

    @property
    def workers(self) -> tuple[str, ...]:
        counts = {"prefill": self.prefill, "decode": self.decode}
        return tuple(f"{role}-{n}" for role, count in counts.items() for n in range(count))

    @property
    def conductor_names(self) -> tuple[str, ...]:
        return tuple(f"conductor-{n}" for n in range(self.conductors))


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What should be gone when everything has ended."""

    processes: tuple[str, ...]
    segments: tuple[str, ...]
    files: tuple[str, ...]
    exit_codes: dict[str, int]

    @property
    def nothing(self) -> bool:
        found = self.processes or self.segments or self.files
        return not found and not any(self.exit_codes.values())


class Cluster:
    """What one can do to it, and see of it from outside. `running` starts one."""

    def __init__(self, shape: Shape, directory: Path) -> None:
        self.shape = shape
        self._token = secrets.token_hex(16)
        self._redis_port = free_port()
        self._ports = {name: (free_port(), free_port()) for name in shape.conductor_names}
        self._tmp = directory / "tmp"
        self._tmp.mkdir()
        commands = _commands(shape, self._ports, free_port(), self._redis_port)
        self.kept = {name: Kept(self._with_env(name, argv), directory) for name, argv in commands}
        self._dialer = GrpcWorkerDialer(self._token)
        self._addresses: dict[str, str] = {}  # of workers
        # Opened once: a client is slow to make, and these are looked through all the time.
        self._clients = {name: Client(self.url(name), timeout_s=ASK_S) for name in self._ports}

    def _with_env(self, name: str, argv: tuple[str, ...]) -> Command:
        env = {
            "BATON_CLUSTER_TOKEN": self._token,
            "BATON_REDIS": f"redis://127.0.0.1:{self._redis_port}",
            "BATON_CLUSTER_NAME": _CLUSTER_NAME,
            "TMPDIR": str(self._tmp),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        return Command(name, argv, env)

    def url(self, conductor: str) -> str:
        return f"http://127.0.0.1:{self._ports[conductor][0]}"

    # -- what can be seen ----------------------------------------------------------------------

    async def members(self, conductor: str) -> dict[str, dict[str, Any]]:
        """Workers and stores by name, as `baton status` has them. Empty when nobody answers."""
        try:
            told = await self._clients[conductor].cluster()
        except BatonError:
            return {}
        return {member["name"]: member for member in (*told["workers"], *told["stores"])}

    async def trace(self, conductor: str, request_id: str) -> dict[str, Any]:
        """Empty when it is not known, or nobody answers."""
        try:
            return await self._clients[conductor].trace(request_id)
        except BatonError:
            return {}

    async def load(self, worker: str) -> WorkerLoad:
        """Asked of the worker itself: the first report over a new link tells it."""
        stream = await self._dialer.link(self._addresses[worker], ASK_S)
        try:
            async with asyncio.timeout(ASK_S):
                while not isinstance(message := await stream.receive(), StepReport):
                    pass
            return message.load
        finally:
            await stream.aclose()

    async def is_live(self, name: str) -> bool:
        """Whether everybody who should know it sees the present life of this process."""
        if not self.kept[name].runs:
            return False
        if name == "redis":
            return await self._announced() >= set(self.shape.conductor_names)
        if name in self.shape.conductor_names:
            others = (*self.shape.workers, "store-0")
            live = await asyncio.gather(*(self._sees(name, other) for other in others))
            return all(live) and name in await self._announced()
        conductors = self.shape.conductor_names
        return all(await asyncio.gather(*(self._sees(each, name) for each in conductors)))

    async def is_ready(self, name: str) -> bool:
        """Whether an operator would go on to the next process: as it says itself, or one conductor
        does, which may be less than everybody sees."""
        if not self.kept[name].runs:
            return False
        if name == "redis":
            return await self.is_live(name)
        if name in self.shape.conductor_names:
            return await self._clients[name].ready()
        seen = await asyncio.gather(*(self._sees(each, name) for each in self._ports))
        return any(seen)

    async def _sees(self, conductor: str, name: str) -> bool:
        members = await self.members(conductor)
        member = members.get(name, {})
        if "address" in member:
            self._addresses[name] = member["address"]
        kept = self.kept[name]
        return member.get("state") == "live" and kept.runs and member.get("pid") == kept.pid

    async def is_dead(self, name: str) -> bool:
        """Whether the others have given this process up."""
        if name == "redis":
            return True  # there is nobody who would say so
        if name in self.shape.conductor_names:
            return name not in await self._announced()
        told = [await self.members(each) for each in self.shape.conductor_names]
        return all(name in members and members[name]["state"] == "dead" for members in told)

    async def _announced(self) -> set[str]:
        registry = open_registry(
            RedisOptions(f"redis://127.0.0.1:{self._redis_port}", _CLUSTER_NAME)
        )
        try:
            return {info.name for info in await registry.conductors()}
        except BatonError:
            return set()
        finally:
            await registry.aclose()

    async def all_live(self, within_s: float) -> None:
        """Return when every process is seen by everybody. Raises ChaosFailed."""
        for name in self.kept:
            if not await until(partial(self.is_live, name), within_s):
                logs = "\n".join(f"--- {n}\n{kept.log_tail()}" for n, kept in self.kept.items())
                raise ChaosFailed(f"{name} is not live after {within_s:g} s\n{logs}")

    # -- its life ------------------------------------------------------------------------------

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name, kept in self.kept.items():
                group.create_task(kept.run(), name=name)

    async def aclose(self) -> None:
        """What looks at it; the processes are `run`'s."""
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def stop(self) -> Leftovers:
        """Workers first, so that they can say goodbye."""
        codes: dict[str, int] = {}
        for names in (self.shape.workers, ("store-0",), self.shape.conductor_names, ("redis",)):
            ended = await asyncio.gather(*(self.kept[name].stop() for name in names))
            codes |= dict(zip(names, ended, strict=True))
        return Leftovers(
            processes=tuple(map(str, await self._still_there())),
            segments=tuple(
                str(path)
                for kept in self.kept.values()
                for path in sorted(kept.segments)
                if path.exists()
            ),
            files=tuple(path.name for path in self._tmp.iterdir()),
            exit_codes=codes,
        )

    async def _still_there(self) -> set[int]:
        mark = f"BATON_CLUSTER_TOKEN={self._token}"

        async def nobody() -> bool:
            return not pids_with(mark)

        await until(nobody, _GONE_S)
        return pids_with(mark)


@asynccontextmanager
async def running(shape: Shape, logs: Path | None = None) -> AsyncGenerator[Cluster, None]:
    """A cluster in which everybody sees everybody. Its owner stops it; what is left is killed."""
    with TemporaryDirectory(prefix="baton-chaos-") as made:
        cluster = Cluster(shape, Path(made))
        keeping = asyncio.create_task(cluster.run(), name="cluster")
        try:
            await _unless_failed(keeping, cluster.all_live(START_S))
            yield cluster
        finally:
            if logs is not None:
                shutil.copytree(made, logs, dirs_exist_ok=True)
            keeping.cancel()
            with suppress(asyncio.CancelledError, ExceptionGroup):
                await keeping
            await cluster.aclose()


async def _unless_failed(keeping: asyncio.Task[None], work: Awaitable[None]) -> None:
    """Await `work`, or raise why the cluster cannot be kept running."""
    waiting = asyncio.ensure_future(work)
    await asyncio.wait({keeping, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if keeping.done():
        waiting.cancel()
        await keeping
    await waiting


def _commands(
    shape: Shape, ports: dict[str, tuple[int, int]], store_port: int, redis_port: int
) -> list[tuple[str, tuple[str, ...]]]:
    """Name and command line of every process. Small steps, so that phases last."""
    redis = shutil.which("redis-server")
    if redis is None:
        raise ChaosFailed("no redis-server in PATH (Debian: apt-get install redis-server)")
    ttl = ("--lease-ttl", f"{shape.lease_ttl_s:g}")
    drain = ("--drain-timeout", f"{shape.drain_timeout_s:g}")
    common = ("--exit-with-parent", *ttl, *drain)
    store_at = f"127.0.0.1:{store_port}"
    worker_flags = (
        *("--store", store_at, "--dtype", shape.dtype, "--kv-memory-mib", str(shape.kv_mib)),
        *("--threads", "1", "--max-batch-tokens", "128", "--max-num-seqs", "16"),
        *("--by-layers-kib", "1", "--layer-groups", "3", "--verify", "full"),
        *common,
    )
    listen = ("--bind", "127.0.0.1", "--port", str(redis_port))
    command = (redis, *listen, "--save", "", "--appendonly", "no")
    commands: list[tuple[str, tuple[str, ...]]] = [("redis", command)]
    for name, (http, grpc) in ports.items():
        at = ("--port", str(http), "--grpc-port", str(grpc), "--local-prefill-tokens", "0")
        # So that clients notice a silent conductor when others do: after three of these.
        beat = ("--sse-keepalive", f"{shape.lease_ttl_s / 3:g}")
        commands.append((name, _python("conductor", name, *at, *beat, *common)))
    size = ("--memory-mib", str(shape.store_mib), "--no-keep-memory", "--dtype", shape.dtype)
    # Two clusters of one machine must not share its files in shared memory.
    memory = ("--memory-name", f"chaos-{store_port}")
    flags = (*size, *memory, "--listen", store_at, *common)
    commands.append(("store-0", _python("kvstore", "store-0", *flags)))
    for name in shape.workers:
        role = name.partition("-")[0]
        commands.append((name, _python(f"{role}_worker", name, *worker_flags)))
    return commands


def _python(module: str, name: str, *flags: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, "--name", name, *flags)
