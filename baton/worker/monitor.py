"""Watching a process over HTTP: `/metrics` and `/health`, on the event loop that they are about.

For a scraper every few seconds and nobody else, so there is no framework: one request per
connection, few connections, and a deadline for each from its first byte to its last. With
certificates it is HTTPS, and the handshake is bounded by the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import cast

from baton.counts import Buckets
from baton.errors import ConfigError
from baton.rpc.tls import Certificates, FrontCertificate
from baton.telemetry import Metrics

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at how late the event loop is
DEADLINE_S = 5.0  # of a connection
MAX_CONNECTIONS = 16
MAX_HEAD_BYTES = 8192
LAGS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds

Render = Callable[[str], tuple[bytes, str]]
"""The exposition for a value of `Accept`, and its content type."""


@asynccontextmanager
async def monitored(
    listen: str,
    port: int,
    render: Render,
    lag: Buckets,
    tls: Certificates | FrontCertificate | None = None,
) -> AsyncIterator[None]:
    """Serve `render` at `port`, on the host of `listen`; 0: do not. Raises ConfigError when that
    is not possible."""
    if not port:
        yield
        return
    exporter = Exporter(render, tls)
    await exporter.start(listen.rpartition(":")[0], port)
    watching = asyncio.create_task(watch_loop(lag), name="loop lag")
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.wait([watching])
        await exporter.aclose()


def loop_lag(metrics: Metrics) -> Buckets:
    """For `watch_loop`."""
    return metrics.distribution(
        "baton_event_loop_lag_seconds",
        "How much later than asked for the process's event loop did something, looked at four "
        "times a second.",
        LAGS,
    )


async def watch_loop(lag: Buckets) -> None:
    """Until cancelled."""
    now = asyncio.get_running_loop().time
    while True:
        due = now() + LOOK_S
        await asyncio.sleep(LOOK_S)
        lag.observe(max(0.0, now() - due))


class Exporter:
    """The server. `aclose` ends what `start` began. With Certificates, it answers only peers of
    the cluster."""

    def __init__(self, render: Render, tls: Certificates | FrontCertificate | None = None) -> None:
        self._render = render
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """The port that was bound. Raises ConfigError."""
        try:
            self._server = await asyncio.start_server(
                self._on_connection, host.strip("[]"), port, limit=MAX_HEAD_BYTES
            )
        except OSError as error:
            reason = str(error.strerror or error).rpartition(": ")[2]  # behind asyncio's own words
            raise ConfigError(
                f"cannot listen on {host}:{port}: {reason}; choose another --metrics-port"
            ) from error
        bound: int = self._server.sockets[0].getsockname()[1]
        log.info("metrics at http%s://%s:%d/metrics", "s" if self._tls else "", host, bound)
        return bound

    async def aclose(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._tls is not None:
            cast(asyncio.Transport, writer.transport).pause_reading()  # it begins with a handshake
        task = asyncio.create_task(self._serve(reader, writer), name="scrape")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._answer(reader, writer)
        except (TimeoutError, EOFError, asyncio.LimitOverrunError, OSError):  # of TLS, too
            pass  # whoever it was does not want to know
        finally:
            writer.transport.abort()  # all was sent, or nobody waits for it

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        full = len(self._connections) > MAX_CONNECTIONS
        if self._tls is not None:
            if full:
                return  # a handshake would take more than the answer is worth
            await writer.start_tls(self._tls.context)
        writer.transport.set_write_buffer_limits(high=0)  # `drain` waits until all was sent
        if full:
            reply = _reply(HTTPStatus.SERVICE_UNAVAILABLE)
        else:
            head = await reader.readuntil(b"\r\n\r\n")
            reply = self._reply(head) if self._admits(writer) else _reply(HTTPStatus.FORBIDDEN)
        writer.write(reply)
        await writer.drain()
        await _end(reader, writer)

    def _admits(self, writer: asyncio.StreamWriter) -> bool:
        """Whether it is one of those whom we show a certificate for."""
        if not isinstance(self._tls, Certificates):
            return True
        return self._tls.is_peer(writer.get_extra_info("peercert") or {})

    def _reply(self, head: bytes) -> bytes:
        line, *fields = head.decode("latin-1").split("\r\n")
        method, _, rest = line.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path not in ("/metrics", "/health"):
            return _reply(HTTPStatus.NOT_FOUND)
        if method != "GET":
            return _reply(HTTPStatus.METHOD_NOT_ALLOWED)
        if path == "/health":
            return _reply(HTTPStatus.OK, b'{"status":"ok"}', "application/json")
        body, content_type = self._render(_accept(fields))
        return _reply(HTTPStatus.OK, body, content_type)


async def _end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say that nothing more comes, and wait until the other side has closed, too."""
    with suppress(ConnectionError):
        if writer.can_write_eof():
            writer.write_eof()
            await reader.read(1)
        else:  # TLS ends both directions at once
            writer.close()
            await writer.wait_closed()


def _accept(fields: list[str]) -> str:
    pairs = (field.partition(":") for field in fields)
    return ",".join(value.strip() for name, _, value in pairs if name.lower() == "accept")


def _reply(status: HTTPStatus, body: bytes = b"", content_type: str = "text/plain") -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + body
