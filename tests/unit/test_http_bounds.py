"""What comes before a body is bounded in bytes and in time."""

from __future__ import annotations

import asyncio

import pytest

from tests.fake_worker import FakeCluster, fake_server
from tests.tenants_kit import ask


async def connect(cluster: FakeCluster) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = cluster.http.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_headers_without_end_are_refused() -> None:
    async with fake_server() as cluster:
        reader, writer = await connect(cluster)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        try:
            for number in range(64):
                writer.write(b"x-%d: %b\r\n" % (number, b"a" * 4096))
                await writer.drain()
        except ConnectionError:
            pass  # it does not read them to their end
        async with asyncio.timeout(20):
            assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")
        writer.close()
        assert (await ask(cluster, "x" * 8000)).status_code == 200  # much, but not too much


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
async def test_headers_that_do_not_come(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conductor.http_protocol.HEAD_S", 0.05)
    async with fake_server() as cluster:
        reader, writer = await connect(cluster)
        writer.write(sent)
        async with asyncio.timeout(20):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_is_used_again_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake_server() as cluster:
        reader, writer = await connect(cluster)
        for _ in range(3):
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(20):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                while (line := await reader.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length"):
                        length = int(line.split(b":")[1])
                await reader.readexactly(length)
        writer.close()
