"""A Redis of our own for tests: on a free port of loopback, nothing written to disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from bench.ports import free_port
from tests.certificates import Authority

BINARY = shutil.which("redis-server")
WHY_NOT = "no redis-server in PATH (Debian: apt-get install redis-server)"
START_S = 20.0


class RedisServer:
    """Keeps its port over `kill` and `start`. With `tls` it speaks nothing else, and trusts clients
    of that authority only."""

    def __init__(
        self, directory: Path, password: str = "", tls: Authority | None = None, acl: str = ""
    ) -> None:
        self.port = free_port()
        self._directory = directory
        self._password = password
        self._tls = tls
        self._acl = acl
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{quote(self._password, safe='')}@127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        assert BINARY is not None
        assert self._process is None
        secret = ("--requirepass", self._password) if self._password else ()
        user = ("--user", *self._acl.split()) if self._acl else ()
        self._process = subprocess.Popen(
            [
                *(BINARY, "--bind", "127.0.0.1", *self._ports(), *secret, *user),
                *("--save", "", "--appendonly", "no", "--dir", str(self._directory)),
            ],
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        """As an outage; everything that it kept is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """It takes connections, and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _ports(self) -> tuple[str, ...]:
        if self._tls is None:
            return ("--port", str(self.port))
        pair = self._tls.issue("127.0.0.1")
        return (
            *("--port", "0", "--tls-port", str(self.port), "--tls-ca-cert-file", str(self._tls.ca)),
            *("--tls-cert-file", str(pair.cert), "--tls-key-file", str(pair.key)),
        )

    def _answers(self) -> bool:
        try:
            with self._connect() as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16)[:5] in (b"+PONG", b"-NOAU")
        except OSError:
            return False

    def _connect(self) -> socket.socket:
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=1.0)
        if self._tls is None:
            return plain
        pair = self._tls.issue("test")
        context = ssl.create_default_context(cafile=str(self._tls.ca))
        context.load_cert_chain(pair.cert, pair.key)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")


@contextmanager
def redis_server(
    password: str = "", tls: Authority | None = None, acl: str = ""
) -> Iterator[RedisServer]:
    """`acl`: a user besides the default one, as `name on >password ~keys +@commands`."""
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(Path(directory), password, tls, acl)
        server.start()
        try:
            yield server
        finally:
            server.kill()
