"""The prefill side of `baton bench handoff`, as a process of its own.

    stdin   {"publish": "r1", "blocks": [3, 1, ...], "layer_groups": 2}  one line each
    stdout  {"address": "127.0.0.1:34567"}                                 once

Ends when stdin ends. The cluster token comes from BATON_CLUSTER_TOKEN, like in every worker.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from baton.kv.handoff.options import HandoffOptions
from baton.kv.handoff.publisher import HandoffPublisher
from baton.kv.identity import Identity
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.registry import make_transport
from baton.rpc.grpc_server import RpcServer
from baton.rpc.services import Duplex
from baton.types.fleet import KvLayout, Peer
from baton.types.handoff import DecodeMessage, PrefillMessage
from baton.types.request import AttemptId, SampledToken

NAME, INCARNATION = "source", "bench"
LAYERS, BLOCK_TOKENS = 4, 16
LEASE_S = 60.0


def bench_layout(block_kib: int) -> KvLayout:
    """Blocks of `block_kib` KiB: 4 layers of keys and values, 16 tokens, float32."""
    per_dim = LAYERS * 2 * BLOCK_TOKENS * 4
    return KvLayout("bench", "float32", LAYERS, 1, block_kib * 1024 // per_dim, BLOCK_TOKENS)


def fill(memory: PoolMemory, seed: int) -> None:
    """Write to every byte, so that pages exist and blocks differ."""
    pool = np.asarray(memory.buffer)
    step = 1 << 20
    piece = np.random.default_rng(seed).integers(0, 256, step, dtype=np.uint8)
    for start in range(0, pool.nbytes, step):
        pool[start : start + step] = piece[: pool.nbytes - start] + np.uint8(start // step % 251)


def source_peer(address: str) -> Peer:
    return Peer(NAME, INCARNATION, address)


@dataclass(slots=True)
class Source:
    """Implements HandoffService."""

    publisher: HandoffPublisher

    async def pair(self, stream: Duplex[PrefillMessage, DecodeMessage]) -> None:
        await self.publisher.serve(stream)

    def publish(self, request: str, blocks: tuple[int, ...], layer_groups: int) -> None:
        """Everything at once: what is measured is the handoff, not prefill."""
        attempt = AttemptId(request)
        edges = [LAYERS * n // layer_groups for n in range(layer_groups + 1)]
        for begin, end in pairwise(edges):
            self.publisher.publish(attempt, 0, blocks, begin, end)
        self.publisher.prefilled(attempt, SampledToken(0, 0), len(blocks))


async def serve(name: str, block_kib: int, blocks: int) -> None:
    layout = bench_layout(block_kib)
    transport = make_transport(name, NAME)
    await transport.start()
    try:
        memory = transport.allocate(blocks * layout.block_bytes)
        fill(memory, 1)
        publisher = HandoffPublisher(
            Identity(NAME, INCARNATION, layout),
            transport,
            memory,
            lambda attempt: None,
            lambda attempt, how: None,
            HandoffOptions(lease_ttl_s=LEASE_S),
        )
        source = Source(publisher)
        server = RpcServer("127.0.0.1:0", os.environ.get("BATON_CLUSTER_TOKEN", ""))
        server.add_handoff(source)
        _say({"address": await server.start()})
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(publisher.run())
            with transport.serving("every reader"):  # plain reads are measured too
                await _obey(source)
            running.cancel()
        await server.stop(1.0)
    finally:
        await transport.close()


async def _obey(source: Source) -> None:
    """Follow the commands on stdin until it ends."""
    commands = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while line := await commands.readline():
        command = json.loads(line)
        source.publish(command["publish"], tuple(command["blocks"]), command["layer_groups"])


def _say(message: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    name, block_kib, blocks = sys.argv[1:]
    asyncio.run(serve(name, int(block_kib), int(blocks)))
    sys.stdout.flush()
    os._exit(0)  # UCX may crash in the loader's clean-up at exit; everything is closed already


if __name__ == "__main__":
    main()
