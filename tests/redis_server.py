"""A Redis of our own for tests: on a free port of loopback, nothing written to disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

BINARY = shutil.which("redis-server")
WHY_NOT = "no redis-server in PATH (Debian: apt-get install redis-server)"
START_S = 20.0


class RedisServer:
    """Keeps its port over `kill` and `start`."""

    def __init__(self, directory: Path, password: str = "") -> None:
        self.port = _free_port()
        self._directory = directory
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{quote(self._password, safe='')}@127.0.0.1:{self.port}"

    def start(self) -> None:
        assert BINARY is not None
        assert self._process is None
        secret = ("--requirepass", self._password) if self._password else ()
        self._process = subprocess.Popen(
            [
                *(BINARY, "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no", "--dir", str(self._directory), *secret),
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

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16)[:5] in (b"+PONG", b"-NOAU")
        except OSError:
            return False


@contextmanager
def redis_server(password: str = "") -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory() as directory:
        server = RedisServer(Path(directory), password)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
