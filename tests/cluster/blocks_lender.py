"""A process that lends blocks until its standard input ends: `python -m ... TRANSPORT`.

It prints its address and life as JSON. Blocks are reused as soon as no loan holds them, and put
back when somebody asks for the first of them again.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator

from baton.kv.blocks.loans import LoanId
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.server import BlocksServer
from baton.kv.digest import Verify
from baton.kv.identity import Identity
from baton.kv.transport.registry import make_transport
from baton.kv.transport.shared import SharedTransport
from baton.rpc.grpc_server import RpcServer
from tests.unit.blocks_kit import BLOCKS, Pool
from tests.unit.test_blocks_transports import LAYOUT

TOKEN = "secret"
COUNT = 16  # blocks
RUN_S = 0.3  # between two of them
OPTIONS = BlocksOptions(lease_ttl_s=1.0, verify=Verify.OFF)


class Refilled(Pool):
    async def lend(self, loan: LoanId, keys: bytes) -> AsyncGenerator[tuple[int, ...], None]:
        if not self.loans:
            self.put(*range(COUNT))
        async for run in super().lend(loan, keys):
            yield run


async def main(name: str) -> None:
    identity = Identity("lender", "life1", LAYOUT)
    transport = make_transport(name, "lender/life1")
    await transport.start()
    memory = await asyncio.to_thread(transport.allocate, BLOCKS * LAYOUT.block_bytes)
    pool = Refilled(memory, LAYOUT, run=COUNT // 2, pause_s=RUN_S, reuse=True)
    blocks = BlocksServer(identity, SharedTransport(transport), memory, pool, None, OPTIONS)
    server = RpcServer("127.0.0.1:0", TOKEN)
    server.add_blocks(blocks)
    sys.stdout.write(json.dumps([identity.name, identity.incarnation, await server.start()]) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await blocks.aclose()
    await server.stop(1.0)
    pool.check_even()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
