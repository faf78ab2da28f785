"""Relay: how many requests and tokens one conductor process passes on, and what it adds to them.

A real conductor on a core of its own, over HTTP and server-sent events to a client, and over gRPC
to workers that compute nothing (`bench_puppet.py`). Client and workers are in this process, on the
other cores. A rate *per core* is by the CPU time of the conductor's process, whatever else held
the load up; a rate by the *clock* is what came through meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.child import Child, ChildSpec
from baton.cpus import available_cpus
from baton.demo import demo_model_path
from baton.errors import InternalError
from baton.model.spec import load_spec
from conductor.bench_client import Connection, Reply, request_bytes
from conductor.bench_figures import Figure, Plan, latencies
from conductor.bench_puppet import TOKEN_TEXT, Pace, puppets

SHORT_REQUESTS = 2_000
STREAMED_REQUESTS = 1_000
ALONE = 500
WARM_UP = 100
AT_ONCE = 32
PROMPT_TOKENS = 128
SHORT_STREAM = 16  # tokens
STREAMS = 64
STREAM_TOKENS = 1_500
PACED_TOKENS = 800
STEP_S = 0.01
PAIRS = 2  # of workers

SECRET = "bench"
_START_S = 30.0
_STOP_S = 5.0
_TIMEOUT_S = 60.0
_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a load: seconds of the conductor's CPU time, and by the clock."""

    cpu_s: float
    clock_s: float


@dataclass(slots=True)
class Rig:
    """A conductor under load."""

    address: str
    pid: int
    pace: Pace
    model: str = "demo"
    tls: ssl.SSLContext | None = None  # what is trusted, of a conductor with HTTPS
    keeps: bool = True  # connections, for the next request
    idle: list[Connection] = field(default_factory=list)

    async def ask(self, tokens: int, stream: bool) -> Reply:
        """One request, over a connection that may be kept alive. Raises InternalError when a token
        is missing."""
        connection = await self._connection()
        reply = await connection.ask(self._request(tokens, stream))
        if self.keeps:
            self.idle.append(connection)
        else:
            connection.close()
        came = reply.body.count(TOKEN_TEXT)
        if not reply.is_ok or came != tokens:
            raise InternalError(f"{came} tokens of {tokens}: {reply.body[-500:]!r}")
        return reply

    def hang_up(self) -> None:
        """Close what is kept."""
        while self.idle:
            self.idle.pop().close()

    async def _connection(self) -> Connection:
        """One that the conductor, which closes those that were not used for seconds, has open."""
        while self.keeps and self.idle:
            if (connection := self.idle.pop()).is_open:
                return connection
        return await Connection.open(self.address, self.tls)

    def _request(self, tokens: int, stream: bool) -> bytes:
        # Token ids: what a tokenizer takes for a text is no part of the relay.
        prompt = [33 + at % 90 for at in range(PROMPT_TOKENS)]
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "stream": stream}
        return request_bytes(self.address, "/v1/completions", {**body, "ignore_eos": True})

    async def cost(self, load: Awaitable[object]) -> Cost:
        cpu, clock = cpu_seconds(self.pid), time.perf_counter()
        await load
        return Cost(cpu_seconds(self.pid) - cpu, time.perf_counter() - clock)


def measure_relay(plan: Plan) -> Iterator[Figure]:
    """On an idle cluster one by one, then many requests at once, then long streams."""
    yield from asyncio.run(_measure())


async def _measure() -> list[Figure]:
    own, others = share_cpus()
    async with asyncio.timeout(_TIMEOUT_S):
        async with conductor_on(own) as listening:
            with on_cpus(others):
                return await _figures(listening)


async def _figures(listening: Mapping[str, Any]) -> list[Figure]:
    fingerprint, pace = load_spec(demo_model_path()).fingerprint, Pace()
    async with puppets(listening["grpc"], SECRET, fingerprint, PAIRS, pace):
        rig = Rig(listening["http"], listening["pid"], pace)
        await many(rig, WARM_UP, SHORT_STREAM, AT_ONCE)
        return [
            *await _latency(rig),
            *await _short(rig, "requests, one token", SHORT_REQUESTS, 1),
            *await _short(rig, "streamed, 16 tokens", STREAMED_REQUESTS, SHORT_STREAM),
            *await _streams(rig, "steps of 10 ms", PACED_TOKENS, STEP_S),
            *await _streams(rig, "as fast as it goes", STREAM_TOKENS, 0.0),
        ]


async def _latency(rig: Rig) -> list[Figure]:
    """Of a request's way in and out, without anything else going on: the time to its first token
    at the client but for what the worker took. Both ends of the client's and the worker's
    connections are in it."""
    added, whole = [], []
    for number in range(WARM_UP + ALONE):
        reply = await rig.ask(SHORT_STREAM, stream=True)
        if number >= WARM_UP:
            added.append(reply.first_s - rig.pace.prefill_s)
            whole.append(reply.end_s)
    return [
        *latencies("relay", "added to TTFT, one request at a time", sorted(added), ""),
        *latencies("relay", f"the whole of it, {SHORT_STREAM} tokens", sorted(whole), ""),
    ]


async def _short(rig: Rig, name: str, count: int, tokens: int) -> list[Figure]:
    rig.pace.step_s = STEP_S if tokens > 1 else 0.0
    cost = await rig.cost(many(rig, count, tokens, AT_ONCE))
    rig.pace.step_s = 0.0
    return [
        Figure("relay", f"{name}, per core", count / cost.cpu_s, "/s", ">= 300/s"),
        Figure("relay", f"{name}, by the clock", count / cost.clock_s, "/s"),
    ]


async def _streams(rig: Rig, name: str, tokens: int, step_s: float) -> list[Figure]:
    rig.pace.step_s = step_s
    cost = await rig.cost(many(rig, STREAMS, tokens, STREAMS))
    rig.pace.step_s = 0.0
    total = STREAMS * tokens
    name = f"streamed tokens, {STREAMS} streams, {name}"
    return [
        Figure("relay", f"{name}, per core", total / cost.cpu_s, "/s", ">= 30,000/s"),
        Figure("relay", f"{name}, by the clock", total / cost.clock_s, "/s"),
    ]


async def many(rig: Rig, count: int, tokens: int, at_once: int) -> None:
    left = iter(range(count))

    async def ask_on() -> None:
        for _ in left:
            await rig.ask(tokens, stream=tokens > 1)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(ask_on())


@asynccontextmanager
async def conductor_on(cpus: str, *flags: str) -> AsyncIterator[Mapping[str, Any]]:
    """A conductor's process on these CPUs: what it announced."""
    argv = [sys.executable, "-m", "conductor", "--port", "0", "--grpc-port", "0", "--announce"]
    argv += ["--exit-with-parent", "--cpus", cpus, "--lease-ttl", "3600", "--log-level", "error"]
    argv += ["--local-prefill-tokens", "0", *flags]  # every request goes to two workers
    ours = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    environ = {**ours, "BATON_CLUSTER_TOKEN": SECRET}
    child = Child(ChildSpec("conductor", argv, environ), _tell)
    running = asyncio.create_task(child.run(), name="conductor")
    try:
        yield await child.announcement(_START_S)
    finally:
        await child.stop(_STOP_S, asyncio.Event())
        await running


def _tell(name: str, line: str) -> None:
    sys.stderr.write(f"{name}: {line}\n")


def share_cpus() -> tuple[str, tuple[int, ...]]:
    """The conductor's, as its flag takes it, and ours; the same one where there is only one."""
    first, *others = available_cpus()
    return str(first), tuple(others) or (first,)


@contextmanager
def on_cpus(cpus: tuple[int, ...]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and all of its threads so far, in user mode and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _HZ
