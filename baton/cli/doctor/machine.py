"""What the checks ask of a machine, so that tests can ask them of machines that they make up."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson

from baton.free_memory import available_bytes

_PROBE_S = 120.0  # torch comes from a slow disk the first time
_RUN_S = 20.0

Found = dict[str, Any] | str
"""What a probe found, or one line that says why it found nothing."""


class Machine(Protocol):
    def read(self, path: str) -> str | None:
        """A small file's text, such as one of /proc; None: it cannot be read."""

    def names(self, path: str) -> list[str]:
        """What is in a directory, sorted; nothing when there is none."""

    def run(self, *command: str) -> str | None:
        """Standard output; None: there is no such program, or it failed."""

    def probe(self, *what: str) -> Found:
        """What `baton.cli.doctor.probes` says in a process of its own. Asked once."""

    def available_memory(self) -> int:
        """Bytes that this process can get, within its control groups."""

    def limit(self, resource: int) -> int | None:
        """The soft limit of this process (resource.RLIMIT_*); None: there is none."""

    def free(self, path: str) -> int | None:
        """Bytes that the file system has left; None: there is no such place."""

    def port_is_free(self, port: int) -> bool: ...


class ThisMachine:
    """Implements Machine. `environ` is that of the probes."""

    def __init__(self, environ: dict[str, str]) -> None:
        self._environ = environ
        self.probe = functools.cache(self._probe)

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None

    def names(self, path: str) -> list[str]:
        try:
            return sorted(entry.name for entry in Path(path).iterdir())
        except OSError:
            return []

    def run(self, *command: str) -> str | None:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_RUN_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def available_memory(self) -> int:
        return available_bytes()

    def limit(self, resource_: int) -> int | None:
        soft, _ = resource.getrlimit(resource_)
        return None if soft == resource.RLIM_INFINITY else soft

    def free(self, path: str) -> int | None:
        try:
            return shutil.disk_usage(path).free
        except OSError:
            return None

    def port_is_free(self, port: int) -> bool:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
        return True

    def _probe(self, *what: str) -> Found:
        command = [sys.executable, "-m", "baton.cli.doctor.probes", *what]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_PROBE_S,
                check=False,
                env=self._environ,
            )
        except subprocess.TimeoutExpired:
            return f"took more than {_PROBE_S:.0f} s"
        lines = list(_objects(done.stdout))
        if done.returncode == 0 and lines:
            error = lines[-1].get("error")
            return lines[-1] if error is None else str(error)
        return (done.stderr.strip().splitlines() or ["no output"])[-1]


def this_machine(redis: str) -> ThisMachine:
    """`redis`: an address that goes before that of the environment."""
    environ = {**os.environ, "BATON_REDIS": redis} if redis else dict(os.environ)
    return ThisMachine(environ)


def _objects(output: str) -> Iterator[dict[str, Any]]:
    """Lines that are JSON, among what libraries print."""
    for line in output.splitlines():
        if line.startswith("{"):
            yield orjson.loads(line)
