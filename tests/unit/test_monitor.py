"""`/metrics` and `/health` of workers and stores: one short answer per connection, and no more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from baton.errors import ConfigError
from baton.telemetry import Metrics
from baton.worker import monitor
from baton.worker.monitor import Exporter, loop_lag, monitored, watch_loop
from tests.virtual_time import virtual_time

HOST = "127.0.0.1"
PATIENCE_S = 20.0
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@asynccontextmanager
async def exporting() -> AsyncIterator[tuple[Exporter, int]]:
    metrics = Metrics()
    metrics.tally("baton_things", "Things.").value = 3
    exporter = Exporter(metrics.render_for)
    try:
        yield exporter, await exporter.start(HOST, 0)
    finally:
        await exporter.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - connections have no event
            await asyncio.sleep(0)


async def send(port: int, text: str) -> tuple[str, str]:
    """The head and the body of the answer."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(text.encode("latin-1"))
        raw = await reader.read()
        writer.close()
        await writer.wait_closed()
    head, _, body = raw.decode().partition("\r\n\r\n")
    return head, body


async def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[str, str]:
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return await send(port, "\r\n".join(lines) + "\r\n\r\n")


async def test_metrics_in_the_format_that_was_asked_for() -> None:
    async with exporting() as (_, port):
        head, body = await get(port, "/metrics")
        assert head.startswith("HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
        assert "baton_things_total 3.0" in body
        assert f"Content-Length: {len(body)}" in head
        head, body = await get(port, "/metrics?name=x", ACCEPT=f"text/html, {OPENMETRICS};q=0.9")
        assert "application/openmetrics-text" in head
        assert body.endswith("# EOF\n")


async def test_health_and_what_is_not_there() -> None:
    async with exporting() as (_, port):
        assert (await get(port, "/health"))[1] == '{"status":"ok"}'
        assert "404 Not Found" in (await get(port, "/"))[0]
        assert "405 Method Not Allowed" in (await get(port, "/metrics", "POST"))[0]


@pytest.mark.parametrize(
    "sent", ["\r\n\r\n", "GET\r\n\r\n", "\x00\xff\r\n\r\n", "GET / HTTP/9\r\n\r\n"]
)
async def test_what_is_no_http_gets_an_answer_all_the_same(sent: str) -> None:
    async with exporting() as (_, port):
        assert "404" in (await send(port, sent))[0]


async def test_a_head_without_end_is_cut_off() -> None:
    async with exporting() as (_, port):
        assert await send(port, "x" * 2 * monitor.MAX_HEAD_BYTES) == ("", "")


async def test_who_says_nothing_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "DEADLINE_S", 0.05)
    async with exporting() as (exporter, port):
        assert await send(port, "GET /metrics") == ("", "")
        assert not exporter._connections


async def test_connections_are_bounded() -> None:
    async with exporting() as (exporter, port):
        silent = [await asyncio.open_connection(HOST, port) for _ in range(monitor.MAX_CONNECTIONS)]
        await until(lambda: len(exporter._connections) == monitor.MAX_CONNECTIONS)
        assert "503" in (await get(port, "/metrics"))[0]
        for _, writer in silent:
            writer.close()
            await writer.wait_closed()
        await until(lambda: not exporter._connections)
        assert "200" in (await get(port, "/metrics"))[0]


async def test_closing_ends_connections() -> None:
    async with exporting() as (exporter, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        await until(lambda: bool(exporter._connections))
        async with asyncio.timeout(PATIENCE_S):
            await exporter.aclose()
            assert not exporter._connections
            assert await reader.read() == b""
        writer.close()


async def test_a_port_that_is_taken_is_a_sentence() -> None:
    metrics = Metrics()
    async with exporting() as (_, port):
        with pytest.raises(
            ConfigError, match=r": address already in use; choose another --metrics-port"
        ):
            async with monitored(f"{HOST}:0", port, metrics.render_for, loop_lag(metrics)):
                pytest.fail("it was served")


async def test_no_port_no_server() -> None:
    metrics = Metrics()
    before = asyncio.all_tasks()
    async with monitored(f"{HOST}:0", 0, metrics.render_for, loop_lag(metrics)):
        assert asyncio.all_tasks() == before


@virtual_time
async def test_a_busy_loop_shows_as_lag() -> None:
    lag = loop_lag(Metrics())
    task = asyncio.create_task(watch_loop(lag))
    await asyncio.sleep(1.1)
    assert (lag.count, lag.sum) == (4, 0.0)
    task.cancel()
    await asyncio.wait([task])
