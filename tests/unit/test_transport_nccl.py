"""The NCCL transport's own parts: its side channel."""

from __future__ import annotations

import asyncio
import json

import pytest

from baton.errors import TransportError
from baton.kv.transport.nccl import NcclTransport


async def test_a_refused_connection_is_closed() -> None:
    closed = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b'"refused"\n')
        await reader.read()
        closed.set()
        writer.close()

    transport = NcclTransport("worker", "127.0.0.1")
    await transport.start()
    transport.allocate(4096)
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        endpoint = json.dumps(["127.0.0.1", port, "cookie", 4096, "cpu"]).encode()
        with pytest.raises(TransportError, match="refused"):
            await transport.connect("peer/1", endpoint)
        await asyncio.wait_for(closed.wait(), 5)
    await transport.close()
