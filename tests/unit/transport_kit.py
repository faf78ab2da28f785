"""Two connected transports of a kind inside one process, with patterned pools."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.kv.transport.base import PoolMemory, Transport
from baton.kv.transport.loopback import FaultPlan, LoopbackFabric
from baton.kv.transport.registry import make_transport

POOL = 1 << 20  # bytes

Bytes = npt.NDArray[np.uint8]


def pattern(nbytes: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def view(memory: PoolMemory) -> Bytes:
    return np.asarray(memory.buffer)


@dataclass(frozen=True, slots=True)
class TransportPair:
    reader: Transport
    source: Transport
    local: Bytes  # the reader's pool
    remote: Bytes  # the source's, filled with a pattern


@asynccontextmanager
async def transport_pair(
    name: str, plan: FaultPlan | None = None, pool: int = POOL
) -> AsyncIterator[TransportPair]:
    """`reader` knows `source` as "source/1", and the other way round as "reader/1"."""
    fabric = LoopbackFabric(plan)
    async with AsyncExitStack() as stack:
        ends = []
        for worker in ("reader", "source"):
            transport = make_transport(name, worker, fabric=fabric)
            stack.push_async_callback(transport.close)
            await transport.start()
            ends.append((transport, view(transport.allocate(pool))))
        (reader, local), (source, remote) = ends
        remote[:] = pattern(pool, 1)
        await source.connect("reader/1", reader.endpoint())
        with source.serving("reader/1"):
            await reader.connect("source/1", source.endpoint())
        yield TransportPair(reader, source, local, remote)
