"""A process that is stopped (SIGSTOP) keeps its connections: only unanswered pings betray it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time

import pytest

from baton.errors import PeerGone
from baton.rpc import grpc_client
from baton.rpc.grpc_client import GrpcWorkerDialer

FASTER = 20  # than in production, so that the test takes a second
SERVER = f"""
import asyncio
from baton.errors import PeerGone
from baton.rpc import grpc_server

options = grpc_server.SERVER_OPTIONS
grpc_server.SERVER_OPTIONS = tuple(
    (name, value // {FASTER} if name.endswith("_ms") else value) for name, value in options
)

class Worker:
    async def link(self, stream):
        try:
            await stream.receive()
        except PeerGone:
            print("gone", flush=True)

async def main():
    server = grpc_server.RpcServer("127.0.0.1:0", "secret")
    server.add_worker(Worker())
    print(await server.start(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_a_stopped_peer_is_noticed_also_on_a_quiet_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [
        (name, value // FASTER if name.endswith("_ms") else value)
        for name, value in grpc_client.CHANNEL_OPTIONS
    ]
    monkeypatch.setattr(grpc_client, "CHANNEL_OPTIONS", tuple(options))
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        address = (await server.stdout.readline()).decode().strip()
        stream = await GrpcWorkerDialer("secret").link(address, 10.0)
        quiet = asyncio.create_task(stream.receive())
        await asyncio.wait([quiet], timeout=2.0)  # several pings, and no message
        assert not quiet.done()
        server.send_signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        with pytest.raises(PeerGone):
            await asyncio.wait_for(quiet, 20)
        assert time.monotonic() - stopped_at < 15
        await stream.aclose()
    finally:
        server.kill()
        await server.wait()
