"""`/metrics` of workers and stores where there are certificates: who reads it, and who does not."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.rpc.tls import Certificates, FrontCertificate, TlsConfig, shown_to_scrapers
from baton.worker import monitor
from baton.worker.monitor import Exporter
from tests.certificates import Authority, Pair

HOST = "127.0.0.1"
PATIENCE_S = 20.0
LINE = b"baton_things_total 1\n"
BODY = LINE * 800_000  # more than the buffers of sockets and of TLS hold


@dataclass(frozen=True)
class Place:
    """Certificates of a process, and the authorities that there are."""

    ours: Authority
    other: Authority
    pair: Pair

    @property
    def certificates(self) -> Certificates:
        return Certificates(TlsConfig(str(self.pair.cert), str(self.pair.key), str(self.ours.ca)))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    ours = Authority(tmp_path, "ours")
    return Place(ours, Authority(tmp_path, "other"), ours.issue("baton"))


@asynccontextmanager
async def exporting(
    tls: Certificates | FrontCertificate | None,
) -> AsyncIterator[tuple[Exporter, int]]:
    exporter = Exporter(lambda accept: (BODY, "text/plain"), tls)
    try:
        yield exporter, await exporter.start(HOST, 0)
    finally:
        await exporter.aclose()


def trusting(authority: Authority, pair: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca))
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return context


async def get(port: int, tls: ssl.SSLContext | None) -> str:
    """All that came of an answer; nothing when the connection was refused or cut."""
    name = "baton" if tls else None
    async with asyncio.timeout(PATIENCE_S):
        try:
            reader, writer = await asyncio.open_connection(
                HOST, port, ssl=tls, server_hostname=name
            )
        except OSError:
            return ""
        try:
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            return (await reader.read()).decode()
        except OSError:
            return ""
        finally:
            writer.transport.abort()


def is_whole(answer: str) -> bool:
    head, _, body = answer.partition("\r\n\r\n")
    return head.startswith("HTTP/1.1 200 OK") and len(body) == len(BODY)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - connections have no event
            await asyncio.sleep(0)


async def test_a_peer_reads_all_of_it_and_strangers_nothing(place: Place) -> None:
    foreign, nameless = place.other.issue("baton"), place.ours.issue("prometheus")
    async with exporting(shown_to_scrapers("mutual", place.certificates)) as (exporter, port):
        assert is_whole(await get(port, trusting(place.ours, place.ours.issue("baton"))))
        assert await get(port, None) == ""
        assert await get(port, trusting(place.ours)) == ""
        assert await get(port, trusting(place.ours, foreign)) == ""
        refusal = await get(port, trusting(place.ours, nameless))
        assert refusal.startswith("HTTP/1.1 403 Forbidden")
        assert "baton_" not in refusal
        await until(lambda: not exporter._connections)


async def test_a_scraper_without_a_certificate_may_be_let_in(place: Place) -> None:
    async with exporting(shown_to_scrapers("server", place.certificates)) as (_, port):
        assert is_whole(await get(port, trusting(place.ours)))
        assert await get(port, trusting(place.other)) == ""  # it knows whom it asks
        assert await get(port, None) == ""


async def test_without_certificates_or_when_told_so_it_is_plain_http(place: Place) -> None:
    assert shown_to_scrapers("mutual", None) is None
    async with exporting(shown_to_scrapers("off", place.certificates)) as (_, port):
        assert is_whole(await get(port, None))


@pytest.mark.parametrize("how", ["mutual", "server"])
async def test_new_files_count_at_the_next_connection(place: Place, how: str) -> None:
    before = trusting(place.ours, place.ours.issue("baton"))
    before.load_verify_locations(place.other.ca)  # it trusts us whatever we show
    after = trusting(place.other, place.other.issue("baton"))
    async with exporting(shown_to_scrapers(how, place.certificates)) as (_, port):
        assert is_whole(await get(port, before))
        new = place.other.issue("baton")
        place.pair.cert.write_bytes(new.cert.read_bytes())
        place.pair.key.write_bytes(new.key.read_bytes())
        place.ours.ca.write_bytes(place.other.ca.read_bytes())
        assert is_whole(await get(port, after))
        assert is_whole(await get(port, before)) is (how == "server")


async def test_a_handshake_has_the_deadline_of_its_connection(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "DEADLINE_S", 0.05)
    async with exporting(place.certificates) as (exporter, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        async with asyncio.timeout(PATIENCE_S):
            assert await reader.read() == b""
        writer.close()
        await until(lambda: not exporter._connections)


async def test_closing_ends_handshakes(place: Place) -> None:
    async with exporting(place.certificates) as (exporter, port):
        reader, writer = await asyncio.open_connection(HOST, port)
        await until(lambda: bool(exporter._connections))
        async with asyncio.timeout(PATIENCE_S):
            await exporter.aclose()
            assert not exporter._connections
            assert await reader.read() == b""
        writer.close()


async def test_handshakes_are_bounded(place: Place) -> None:
    peer = trusting(place.ours, place.ours.issue("baton"))
    async with exporting(place.certificates) as (exporter, port):
        silent = [await asyncio.open_connection(HOST, port) for _ in range(monitor.MAX_CONNECTIONS)]
        await until(lambda: len(exporter._connections) == monitor.MAX_CONNECTIONS)
        assert await get(port, peer) == ""
        for _, writer in silent:
            writer.close()
        await until(lambda: not exporter._connections)
        assert is_whole(await get(port, peer))
