"""The client over HTTPS: what it trusts, and what it says when it does not."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from baton.cli.main import app
from baton.client.http import Client
from baton.client.trust import trusted
from baton.errors import ConfigError, PeerGone
from baton.rpc.tls import FrontCertificate, trusting_only
from tests.certificates import Authority
from tests.unit.metrics_kit import ROOT

REPLY = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def answering(context: ssl.SSLContext | None) -> AsyncIterator[str]:
    """A server for one request per connection: host and port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read(4096)  # also of what is no HTTP
            writer.write(REPLY)
            await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


async def failure(url: str, tls: ssl.SSLContext | None = None) -> str:
    async with Client(url, 10.0, tls=tls) as client:
        with pytest.raises(PeerGone) as refusal:
            await client.cluster()
        return refusal.value.message


async def test_what_is_trusted(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path, "ours"), Authority(tmp_path, "other")
    pair = ours.issue("127.0.0.1")
    async with answering(FrontCertificate(str(pair.cert), str(pair.key)).context) as address:
        assert trusted("") is None
        assert "--ca-file (BATON_CA_FILE) names" in await failure(f"https://{address}")
        refusal = await failure(f"https://{address}", trusted(str(other.ca)))
        assert "not trusted here" in refusal
        for tls in (trusted(str(ours.ca)), trusting_only(str(pair.cert))):
            async with Client(f"https://{address}", 10.0, tls=tls) as client:
                assert await client.cluster() == {}


async def test_a_name_that_is_not_in_the_certificate(tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    pair = ours.issue("baton.example.com")
    trusts = ssl.create_default_context(cafile=str(ours.ca))
    async with answering(FrontCertificate(str(pair.cert), str(pair.key)).context) as address:
        assert "is not valid for '127.0.0.1'" in await failure(f"https://{address}", trusts)


async def test_the_wrong_scheme_is_said(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("127.0.0.1")
    async with answering(FrontCertificate(str(pair.cert), str(pair.key)).context) as address:
        assert "write https://" in await failure(f"http://{address}")
    async with answering(None) as address:
        assert "write http://" in await failure(f"https://{address}")


COMMANDS = {
    "generate": ("generate", "text"),
    "chat": ("chat",),
    "status": ("status",),
    "top": ("top", "--once"),
    "trace": ("trace", "id"),
    "bench serve": ("bench", "serve", "--url", "https://localhost"),
    "bench handoff": ("bench", "handoff", "--url", "https://localhost"),
    "ray up": ("ray", "up", "--config", "deploy/ray/cluster.yaml"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_every_client_command_takes_authorities(
    command: tuple[str, ...], by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says at once what is wrong with them."""
    monkeypatch.chdir(ROOT)
    junk = tmp_path / "junk"
    junk.write_text("no certificate")
    problems = {tmp_path / "missing": "cannot be read: No such", junk: "has no certificate (PEM)"}
    for path, problem in problems.items():
        flags = ("--ca-file", str(path)) if by == "flag" else ()
        environ = {"BATON_CA_FILE": str(path) if by == "variable" else "/other"}
        result = CliRunner().invoke(app, [*command, *flags], env=environ)
        assert isinstance(result.exception, ConfigError), result.output
        assert f"--ca-file (BATON_CA_FILE): {path} {problem}" in result.exception.message
