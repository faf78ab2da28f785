"""A real transfer: KV-sized blocks from the memory of another process, by one of our transports.

reader (probe)                       source (`python -m baton.cli.doctor.transfer NAME`)
                <-- endpoint ------  one line of base64
connect         --- endpoint ----->  connect, then serve until standard input ends
read, compare
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import os
import random
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt

from baton.errors import TransportError
from baton.kv.transport.base import Copy, Transport
from baton.kv.transport.registry import make_transport

BLOCKS, BLOCK = 32, 1 << 20  # 32 MiB
ROUNDS = 4  # the first sets the connection up
START_S, READ_S, STOP_S = 90.0, 20.0, 5.0

Bytes = npt.NDArray[np.uint8]


async def read_from_another_process(name: str) -> float:
    """Bytes per second of the best round. Raises BatonError when it does not work."""
    transport = make_transport(name, "doctor-reader")
    await transport.start()
    try:
        pool = np.asarray(transport.allocate(BLOCKS * BLOCK).buffer)
        async with _source(name) as source:
            await _meet(transport, source)
            return max([await _round(transport, pool) for _ in range(ROUNDS)][1:])
    finally:
        await transport.close()


async def _round(transport: Transport, pool: Bytes) -> float:
    """Every block of the source, scattered, into ours."""
    expected = _contents().reshape(BLOCKS, BLOCK)
    pool[:] = 0
    order = random.Random(0).sample(range(BLOCKS), BLOCKS)
    copies = [Copy(there * BLOCK, here * BLOCK, BLOCK) for here, there in enumerate(order)]
    loop = asyncio.get_running_loop()
    begin = loop.time()
    transfer = transport.read("source", copies)
    try:
        async with asyncio.timeout(READ_S):
            await transfer.wait()
    except TimeoutError:
        raise TransportError(f"nothing came within {READ_S:.0f} s") from None
    finally:
        await transfer.abort()
    seconds = loop.time() - begin
    if not np.array_equal(pool.reshape(BLOCKS, BLOCK), expected[order]):
        raise TransportError("what came differs from what was sent")
    return BLOCKS * BLOCK / seconds


@functools.cache
def _contents() -> Bytes:
    return np.random.default_rng(7).integers(0, 256, BLOCKS * BLOCK, dtype=np.uint8)


@contextlib.asynccontextmanager
async def _source(name: str) -> AsyncIterator[Process]:
    command = (sys.executable, "-m", "baton.cli.doctor.transfer", name)
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _meet(transport: Transport, source: Process) -> None:
    assert source.stdin is not None
    assert source.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            line = await source.stdout.readline()
            if not line:
                raise TransportError("the other process ended")
            source.stdin.write(base64.b64encode(transport.endpoint()) + b"\n")
            await source.stdin.drain()
            await transport.connect("source", base64.b64decode(line))
            await source.stdout.readline()
    except TimeoutError:
        raise TransportError(f"the other process was not there within {START_S:.0f} s") from None


async def serve(name: str) -> None:
    transport = make_transport(name, "doctor-source")
    await transport.start()
    try:
        np.asarray(transport.allocate(BLOCKS * BLOCK).buffer)[:] = _contents()
        _say(base64.b64encode(transport.endpoint()))
        reader = asyncio.StreamReader(limit=1 << 20)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await transport.connect("reader", base64.b64decode(await reader.readline()))
        _say(b"connected")
        with transport.serving("reader"):
            await reader.read()  # until the reader ends
    finally:
        await transport.close()


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
    os._exit(0)  # see probes.py
