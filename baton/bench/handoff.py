"""`baton bench handoff`: KV from another process, next to a plain memory copy.

Two processes: this one reads, `baton.bench.handoff_source` publishes. In every round, the first two
in turns of an eighth, so that a noisy machine is as noisy for both:

    transport   scattered blocks of the source, read by the transport into our pool
    copy        the same scatter between two arrays of this process, by one thread
    handoff     the whole protocol over gRPC: attach, read, verify, release
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from baton.bench.exposed import Exposure
from baton.bench.handoff_source import LAYERS, bench_layout, fill, source_peer
from baton.bench.origin import origin
from baton.bench.stats import percentile
from baton.errors import ConfigError, PeerGone
from baton.kv.handoff.options import HandoffOptions
from baton.kv.handoff.reader import Fetched, HandoffReader, Place
from baton.kv.identity import Identity, life
from baton.kv.layout import copies_for
from baton.kv.transport.base import Copy, Transport
from baton.kv.transport.registry import make_transport
from baton.rpc.grpc_client import GrpcHandoffDialer
from baton.types.fleet import KvLayout, Peer
from baton.types.request import AttemptId

OnProgress = Callable[[int, int], None]  # rounds done, rounds of the run

SINGLE_READS = 100  # of one block, per round
LAYER_GROUPS = 2
PARTS = 8  # of a round, in which transport and copy take turns
START_S, HANDOFF_S, STOP_S = 60.0, 120.0, 10.0

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class HandoffResult:
    """One transport at one block size. Rates are medians over rounds, GB/s = 1e9 bytes/s."""

    transport: str
    block_kib: int
    blocks: int
    nbytes: int  # per round
    transport_gbps: float
    copy_gbps: float
    ratio: float  # median over rounds of transport / copy in the same round
    handoff_gbps: float  # attach to released, verification included
    single_read_p50_s: float  # one block
    single_read_p99_s: float


@dataclass(frozen=True, slots=True)
class HandoffReport:
    results: tuple[HandoffResult, ...]
    total_mib: int
    rounds: int


@dataclass(frozen=True, slots=True)
class _Round:
    transport_s: float
    copy_s: float
    handoff_s: float
    single_s: tuple[float, ...]


def run(
    transports: Sequence[str],
    total_mib: int,
    block_kib: Sequence[int],
    rounds: int,
    progress: OnProgress,
) -> HandoffReport:
    """Measure every transport at every block size. Raises ConfigError for what cannot be measured.

    Call it outside of an event loop.
    """
    plans = [(name, kib) for name in transports for kib in block_kib]
    for name, kib in plans:
        if name == "loopback":
            raise ConfigError("loopback has no second process to read from; choose another")
        if not 1 <= kib <= total_mib * 1024:
            raise ConfigError(f"blocks of {kib} KiB do not fit {total_mib} MiB")
    total = len(plans) * rounds
    results = []
    for done, (name, kib) in enumerate(plans):

        def count(rounds_done: int, before: int = done * rounds) -> None:
            progress(before + rounds_done, total)

        results.append(asyncio.run(_measure(name, total_mib, kib, rounds, count)))
    return HandoffReport(tuple(results), total_mib, rounds)


def as_json(
    report: HandoffReport, exposures: Sequence[Exposure], argv: Sequence[str]
) -> dict[str, Any]:
    """The report with what is needed to repeat it."""
    return {
        **origin("handoff", "baton", *argv),
        "total_mib": report.total_mib,
        "rounds": report.rounds,
        "results": [asdict(result) for result in report.results],
        "exposed": [asdict(exposure) for exposure in exposures],
    }


def table(report: HandoffReport) -> Table:
    title = f"KV handoff, {report.total_mib} MiB per round, {report.rounds} rounds, GB/s"
    drawn = Table(title=title)
    drawn.add_column("transport")
    for column in ("block KiB", "read", "copy", "read/copy", "handoff", "p50 µs", "p99 µs"):
        drawn.add_column(column, justify="right")
    for r in report.results:
        drawn.add_row(
            r.transport,
            str(r.block_kib),
            f"{r.transport_gbps:.2f}",
            f"{r.copy_gbps:.2f}",
            f"{r.ratio:.0%}",
            f"{r.handoff_gbps:.2f}",
            f"{r.single_read_p50_s * 1e6:.0f}",
            f"{r.single_read_p99_s * 1e6:.0f}",
        )
    drawn.caption = "copy: the same scatter inside one process; µs: one block by itself"
    return drawn


async def _measure(
    name: str, total_mib: int, block_kib: int, rounds: int, count: Callable[[int], None]
) -> HandoffResult:
    layout = bench_layout(block_kib)
    blocks = (total_mib << 20) // layout.block_bytes
    async with connected(name, layout, block_kib, blocks) as bench:
        await bench.round(0)  # connections, page faults, descriptor lists
        measured = []
        for number in range(1, rounds + 1):
            measured.append(await bench.round(number))
            count(number)
    nbytes = blocks * layout.block_bytes
    singles = sorted(s for r in measured for s in r.single_s)
    return HandoffResult(
        name,
        block_kib,
        blocks,
        nbytes,
        nbytes / float(np.median([r.transport_s for r in measured])) / 1e9,
        nbytes / float(np.median([r.copy_s for r in measured])) / 1e9,
        float(np.median([r.copy_s / r.transport_s for r in measured])),
        nbytes / float(np.median([r.handoff_s for r in measured])) / 1e9,
        percentile(singles, 50),
        percentile(singles, 99),
    )


@dataclass(slots=True)
class Bench:
    """A connected reader. `local` is our pool; `other` is what the plain copy reads from."""

    layout: KvLayout
    transport: Transport
    reader: HandoffReader
    peer: Peer
    source: Process
    local: Bytes
    other: Bytes
    random: np.random.Generator

    async def round(self, number: int) -> _Round:
        blocks = self.local.nbytes // self.layout.block_bytes
        remote = tuple(int(n) for n in self.random.permutation(blocks))
        local = tuple(int(n) for n in self.random.permutation(blocks))
        handoff_s = await self.handoff(f"r{number}", remote, local)
        copies = copies_for(self.layout, remote, local, 0, LAYERS)
        read_s = copy_s = 0.0
        step = max(1, len(copies) // PARTS)
        for start in range(0, len(copies), step):
            part = copies[start : start + step]
            read_s += await self.read(part)
            copy_s += self._copy(part)
        single_s = tuple([await self.read([c]) for c in copies[:SINGLE_READS]])
        return _Round(read_s, copy_s, handoff_s, single_s)

    async def read(self, copies: Sequence[Copy]) -> float:
        """Seconds that the transport takes."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.timeout(HANDOFF_S):
            await self.transport.read(life(self.peer.name, self.peer.incarnation), copies).wait()
        return loop.time() - start

    def _copy(self, copies: Sequence[Copy]) -> float:
        """Seconds of the same scatter inside this process."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        for c in copies:
            self.local[c.local : c.local + c.length] = self.other[c.remote : c.remote + c.length]
        return loop.time() - start

    async def handoff(self, request: str, remote: Sequence[int], local: tuple[int, ...]) -> float:
        """Seconds from attach to released; everything is published by then."""
        await self.tell({"publish": request, "blocks": remote, "layer_groups": LAYER_GROUPS})
        fetched = await self.fetch(AttemptId(request), local)
        return fetched.stats.released_s - max(fetched.stats.attached_s, fetched.stats.first_range_s)

    async def fetch(self, attempt: AttemptId, local: tuple[int, ...]) -> Fetched:
        async def reserve() -> Place:
            return Place(local)

        return await self.reader.fetch(attempt, self.peer, reserve, HANDOFF_S)

    async def tell(self, command: dict[str, object]) -> None:
        if self.source.stdin is None:
            raise PeerGone("the source process has no stdin")
        self.source.stdin.write(json.dumps(command).encode() + b"\n")
        await self.source.stdin.drain()


@asynccontextmanager
async def connected(
    name: str, layout: KvLayout, block_kib: int, blocks: int
) -> AsyncIterator[Bench]:
    """A source process and a reader in this one, whose pools hold `blocks` blocks each."""
    token = secrets.token_hex(16)
    async with _source_process(token, name, block_kib, blocks) as (source, peer):
        transport = make_transport(name, "reader")
        await transport.start()
        try:
            memory = transport.allocate(blocks * layout.block_bytes)
            reader = HandoffReader(
                Identity("reader", "bench", layout),
                transport,
                memory,
                GrpcHandoffDialer(token),
                lambda attempt: None,
                lambda attempt: None,
                HandoffOptions(),
            )
            local = np.asarray(memory.buffer)
            other = np.empty_like(local)
            fill(memory, 2)
            other[:] = local
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(reader.run())
                await asyncio.sleep(0)  # let it begin
                random = np.random.default_rng(blocks)
                yield Bench(layout, transport, reader, peer, source, local, other, random)
                running.cancel()
        finally:
            await transport.close()


@asynccontextmanager
async def _source_process(
    token: str, name: str, block_kib: int, blocks: int
) -> AsyncIterator[tuple[Process, Peer]]:
    command = [sys.executable, "-m", "baton.bench.handoff_source", name, str(block_kib)]
    environ = os.environ | {"BATON_CLUSTER_TOKEN": token}
    process = await asyncio.create_subprocess_exec(
        *command, str(blocks), stdin=PIPE, stdout=PIPE, env=environ
    )
    try:
        if process.stdin is None or process.stdout is None:
            raise PeerGone("the source process has no pipes")
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        if not line:
            raise ConfigError(f"the source process for {name} did not start; its error is above")
        yield process, source_peer(json.loads(line)["address"])
        process.stdin.close()
        async with asyncio.timeout(STOP_S):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
