"""Handoffs between two real processes, over gRPC and each transport that can cross processes."""

from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest

from baton.bench.handoff import as_json, connected, run, table
from baton.bench.handoff_source import bench_layout, fill
from baton.errors import ConfigError, PeerGone, TransportError
from baton.kv.layout import copies_for
from baton.kv.transport.memory import cpu_pool
from baton.kv.transport.registry import make_transport
from baton.kv.transport.shm import ShmEndpoint
from baton.types.request import AttemptId
from tests.cluster.conftest import shared_memory_of
from tests.unit.transport_kit import Bytes

pytestmark = pytest.mark.cluster

KIB, BLOCKS = 64, 32
LAYOUT = bench_layout(KIB)


def published() -> Bytes:
    """What the source process holds: [blocks, bytes]."""
    memory = cpu_pool(BLOCKS * LAYOUT.block_bytes)
    fill(memory, 1)
    return np.asarray(memory.buffer).reshape(BLOCKS, -1)


@pytest.mark.parametrize("transport", ["nixl", "nixl-tcp", "shm", "nccl"])
async def test_kv_of_another_process_arrives(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, tls = transport.partition("-")
    if tls:
        monkeypatch.setenv("UCX_TLS", tls)
    remote, local = (5, 6, 31, 0), (1, 9, 10, 2)
    async with connected(name, LAYOUT, KIB, BLOCKS) as bench:
        before = bench.local.copy().reshape(BLOCKS, -1)
        await bench.handoff("first", remote, local)
        before[list(local)] = published()[list(remote)]
        assert np.array_equal(bench.local.reshape(BLOCKS, -1), before)
        await asyncio.gather(
            *(bench.handoff(f"r{n}", (n,), (BLOCKS - 1 - n,)) for n in range(BLOCKS // 2))
        )
        await bench.read(copies_for(LAYOUT, remote, local, 0, 2))


@pytest.mark.parametrize("name", ["nixl", "shm", "nccl"])
async def test_a_source_that_is_killed_fails_its_readers_and_leaks_nothing(name: str) -> None:
    async with connected(name, LAYOUT, KIB, BLOCKS) as bench:
        await bench.handoff("warm", (1,), (1,))
        segments = shared_memory_of({bench.source.pid, os.getpid()})  # memfds have no name
        # Published but never complete for this number of blocks: the fetch waits for more.
        fetching = asyncio.create_task(bench.fetch(AttemptId("never"), (3, 4)))
        await asyncio.sleep(0.1)
        os.kill(bench.source.pid, signal.SIGKILL)
        with pytest.raises(PeerGone):
            await asyncio.wait_for(fetching, 20)
        with pytest.raises(TransportError):  # the stream's end disconnected the peer
            await bench.read(copies_for(LAYOUT, (1,), (1,), 0, 4))
    assert [path for path in segments if path.exists() and "baton" in path.name] == []


async def test_shm_is_not_fooled_by_a_process_that_is_not_the_one_announced() -> None:
    one, other = make_transport("shm", "one"), make_transport("shm", "other")
    for transport in (one, other):
        await transport.start()
        transport.allocate(1 << 16)
    announced = ShmEndpoint.decode(other.endpoint())
    for wrong in (
        ShmEndpoint(announced.pid, announced.fd, "00" * 32, announced.nbytes),
        ShmEndpoint(announced.pid, announced.fd, announced.cookie, announced.nbytes + 4096),
        ShmEndpoint(announced.pid, 0, announced.cookie, announced.nbytes),
        ShmEndpoint(2**22 + 1, announced.fd, announced.cookie, announced.nbytes),
    ):
        with pytest.raises(TransportError, match="other/1"):
            await one.connect("other/1", wrong.encode())
    await one.connect("other/1", other.endpoint())
    for transport in (one, other):
        await transport.close()


def test_the_benchmark_reports_every_transport_and_block_size() -> None:
    progress: list[tuple[int, int]] = []
    report = run(["shm"], 2, [64, 256], 2, lambda done, of: progress.append((done, of)))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [(r.transport, r.block_kib, r.blocks) for r in report.results] == [
        ("shm", 64, 32),
        ("shm", 256, 8),
    ]
    for result in report.results:
        assert result.nbytes == 2 << 20
        assert min(result.transport_gbps, result.copy_gbps, result.handoff_gbps) > 0
        assert 0 < result.single_read_p50_s <= result.single_read_p99_s
    told = as_json(report, (), ["baton", "bench", "handoff"])
    assert len(told["results"]) == 2
    assert table(report).row_count == 2


def test_what_cannot_be_measured_is_refused() -> None:
    for transports, kib in ((["loopback"], 64), (["shm"], 4096)):
        with pytest.raises(ConfigError):
            run(transports, 2, [kib], 1, lambda done, of: None)
