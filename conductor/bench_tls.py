"""TLS: what it adds to the relay, for clients, between the processes, and for both.

A conductor for each case, all on one core, of which one works at a time: rounds go through the
cases in turn, and what is compared lies seconds apart. CPU time is that of the conductor's process.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from baton.demo import demo_model_path
from baton.errors import ConfigError
from baton.model.spec import load_spec
from baton.rpc.tls import Certificates, TlsConfig, trusting_only
from conductor.bench_figures import Figure, Plan
from conductor.bench_puppet import Pace, puppets
from conductor.bench_relay import PAIRS, SECRET, Rig, conductor_on, many, on_cpus, share_cpus

ROUNDS = 5
REQUESTS = 200
AT_ONCE = 16
STREAMS = 64
STREAM_TOKENS = 200
ALONE = 50

_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    clients: bool = False
    between: bool = False

    def flags(self, files: TlsConfig) -> tuple[str, ...]:
        front = ("--ssl-certfile", files.cert, "--ssl-keyfile", files.key)
        between = ("--tls-cert", files.cert, "--tls-key", files.key, "--tls-ca", files.ca)
        name = ("--tls-peer-name", files.peer_name)
        return front * self.clients + (*between, *name) * self.between


PLAIN = Case("plain")
CASES = (
    PLAIN,
    Case("for clients", clients=True),
    Case("between processes", between=True),
    Case("both", clients=True, between=True),
)


async def _token(rig: Rig) -> float:
    cost = await rig.cost(many(rig, STREAMS, STREAM_TOKENS, STREAMS))
    return cost.cpu_s / (STREAMS * STREAM_TOKENS)


async def _request(rig: Rig) -> float:
    return (await rig.cost(many(rig, REQUESTS, 1, AT_ONCE))).cpu_s / REQUESTS


async def _request_and_handshake(rig: Rig) -> float:
    rig.keeps = False
    try:
        return await _request(rig)
    finally:
        rig.keeps = True


async def _first_token(rig: Rig) -> float:
    """By the clock, both ends included: on an idle conductor, over a connection that is kept."""
    added = []
    for _ in range(ALONE):
        reply = await rig.ask(2, stream=True)
        added.append(reply.first_s - rig.pace.prefill_s)
    return statistics.median(added)


LOADS: Mapping[str, Callable[[Rig], Awaitable[float]]] = {
    "CPU of a streamed token": _token,
    "CPU of a request over a kept connection": _request,
    "CPU of a request with a connection of its own": _request_and_handshake,
    "added to TTFT, p50": _first_token,
}


def measure_tls(plan: Plan) -> Iterator[Figure]:
    """Raises ConfigError without certificates."""
    if plan.tls is None:
        raise ConfigError("--parts tls needs --tls-cert, --tls-key and --tls-ca")
    yield from asyncio.run(_measure(plan.tls))


async def _measure(files: TlsConfig) -> list[Figure]:
    own, others = share_cpus()
    async with asyncio.timeout(_TIMEOUT_S), AsyncExitStack() as stack:
        rigs = {case: await stack.enter_async_context(_rig(case, files, own)) for case in CASES}
        with on_cpus(others):
            return [figure for name in LOADS for figure in await _compare(name, rigs)]


@asynccontextmanager
async def _rig(case: Case, files: TlsConfig, cpus: str) -> AsyncIterator[Rig]:
    pace, fingerprint = Pace(), load_spec(demo_model_path()).fingerprint
    certificates = Certificates(files) if case.between else None
    async with conductor_on(cpus, *case.flags(files)) as listening:
        for_workers = listening.get("for_workers") or listening["grpc"]
        async with puppets(for_workers, SECRET, fingerprint, PAIRS, pace, certificates):
            rig = Rig(listening["http"], listening["pid"], pace)
            rig.tls = trusting_only(files.cert) if case.clients else None
            yield rig


async def _compare(load: str, rigs: Mapping[Case, Rig]) -> list[Figure]:
    rounds = [{case: await _once(load, rig) for case, rig in rigs.items()} for _ in range(ROUNDS)]
    figures = []
    for case in rigs:
        seconds = statistics.median(each[case] for each in rounds)
        figures.append(Figure("tls", f"{load}, {case.name}", seconds * 1e6, "µs"))
        if case is not PLAIN:
            ratio = statistics.median(each[case] / each[PLAIN] for each in rounds)
            figures.append(Figure("tls", f"{load}, {case.name} / plain", ratio, ""))
    return figures


async def _once(load: str, rig: Rig) -> float:
    """Its connections are there before, and not left until the conductor closes them."""
    await many(rig, STREAMS, 2, STREAMS)
    try:
        return await LOADS[load](rig)
    finally:
        rig.hang_up()
