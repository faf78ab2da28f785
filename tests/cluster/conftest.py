"""Clusters of real processes for tests, and the checks that nothing of them is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

START_S = 100.0
STOP_S = 60.0
IDLE_S = 20.0
SETTLED = {"free", "cached"}


@dataclass
class Cluster:
    """A running `baton serve`. `http` and `grpc` are `host:port`; `trusts` is for its clients."""

    process: subprocess.Popen[str]
    token: str
    directory: Path  # its home for temporary files
    stderr: deque[str]
    http: str = ""
    grpc: str = ""
    ready: dict[str, Any] = field(default_factory=dict)
    trusts: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    def status(self) -> dict[str, Any]:
        return dict(self.get("/cluster").json())

    def get(self, path: str) -> httpx.Response:
        verify = self.trusts or True
        return httpx.get(self.url + path, timeout=30.0, trust_env=False, verify=verify)

    def post(self, path: str, body: Any, timeout_s: float = 100.0) -> httpx.Response:
        return httpx.post(
            self.url + path,
            json=body,
            timeout=timeout_s,
            trust_env=False,
            verify=self.trusts or True,
        )

    def cli(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a client command of baton against this cluster."""
        return run_cli(*argv, "--url", self.url, stdin=stdin)

    def pids(self) -> set[int]:
        """Every process that belongs to this cluster, whoever started it."""
        return pids_with(f"BATON_CLUSTER_TOKEN={self.token}")

    def worker_blocks(self) -> dict[str, dict[str, int]]:
        return {worker["name"]: worker["blocks"] for worker in self.status()["workers"]}

    def assert_idle(self) -> None:
        """Every worker is done, and every block is free or cached (within a few seconds: the last
        report may still be on its way)."""
        deadline = time.monotonic() + IDLE_S
        while not all(map(_is_idle, workers := self.status()["workers"])):
            assert time.monotonic() < deadline, f"not idle after {IDLE_S} s: {workers}"
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGINT) -> int:
        """As Ctrl-C does. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(STOP_S)


ClusterFactory = Callable[..., AbstractContextManager[Cluster]]


def _is_idle(worker: dict[str, Any]) -> bool:
    held = {state for state, count in worker["blocks"].items() if count}
    return not worker["running"] and not worker["waiting"] and held <= SETTLED


def run_cli(
    *argv: str, stdin: str | None = None, timeout_s: float = 100.0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "baton.cli.main", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"},
    )


def pids_with(variable: str) -> set[int]:
    """Living processes that were started with this environment variable."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            entries = (directory / "environ").read_bytes().split(b"\0")
            if variable.encode() in entries:
                found.add(int(directory.name))
    return found


def wait_until_gone(find: Callable[[], set[int]], seconds: float) -> set[int]:
    """The processes that are still there after `seconds`."""
    deadline = time.monotonic() + seconds
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def shared_memory_of(pids: set[int]) -> set[Path]:
    """Named segments that these processes have mapped."""
    paths = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/maps").read_text()
            paths |= set(re.findall(r"/dev/shm/\S+", text))
    return {Path(path) for path in paths}


@contextmanager
def serve(
    directory: Path,
    *flags: str,
    start_s: float = START_S,
    log_lines: int = 200,
    trusts: ssl.SSLContext | None = None,
) -> Iterator[Cluster]:
    """`baton serve` on free ports. Afterwards nothing of it may be left. The last `log_lines` of
    all processes are kept. `trusts`: for clients of one with --ssl-certfile."""
    token = secrets.token_hex(16)
    directory.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "baton.cli.main", "serve", "--json", "--verbose"),
            *("--port", "0", "--grpc-port", "0", *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "BATON_CLUSTER_TOKEN": token,
            "TMPDIR": str(directory),
            "PYTHONUNBUFFERED": "1",
        },
    )
    cluster = Cluster(process, token, directory, stderr=deque(maxlen=log_lines), trusts=trusts)
    reader = threading.Thread(target=_keep_lines, args=(process, cluster.stderr))
    reader.start()
    segments: set[Path] = set()
    try:
        _wait_ready(cluster, start_s)
        segments = shared_memory_of(cluster.pids())
        yield cluster
        if process.poll() is None:
            cluster.assert_idle()
            assert cluster.stop() == 0, "\n".join(cluster.stderr)
    finally:
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                cluster.stop()
        left = wait_until_gone(cluster.pids, 10.0)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(STOP_S)
        reader.join(STOP_S)
        assert process.stdout is not None
        process.stdout.close()
    assert not left, f"processes left: {left}"
    assert not [path for path in segments if path.exists()]
    assert not list(directory.iterdir()), "temporary files left"
    for address in (cluster.http, cluster.grpc):
        assert not is_listening(address)


def _wait_ready(cluster: Cluster, start_s: float) -> None:
    assert cluster.process.stdout is not None
    timer = threading.Timer(start_s, cluster.process.kill)
    timer.start()
    try:
        for line in cluster.process.stdout:
            event = json.loads(line)
            if event["event"] == "ready":
                cluster.ready = event
                cluster.http, cluster.grpc = event["http"], event["grpc"]
                break
        else:
            cluster.process.wait(STOP_S)
            pytest.fail("the cluster did not start:\n" + "\n".join(cluster.stderr))
    finally:
        timer.cancel()
    drain = threading.Thread(target=_discard, args=(cluster.process,), daemon=True)
    drain.start()


def _keep_lines(process: subprocess.Popen[str], lines: deque[str]) -> None:
    assert process.stderr is not None
    with process.stderr:
        lines.extend(line.rstrip() for line in process.stderr)


def _discard(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):  # closed at the end
        for _ in process.stdout:
            pass


def is_listening(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False


@pytest.fixture(scope="session")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> ClusterFactory:
    """`with start_cluster(*flags_of_baton_serve) as cluster:`"""

    def start(*flags: str) -> AbstractContextManager[Cluster]:
        return serve(tmp_path_factory.mktemp("cluster"), *flags)

    return start


@pytest.fixture(scope="module")
def cluster(start_cluster: ClusterFactory) -> Iterator[Cluster]:
    """The demo model on one prefill and one decode worker, for all tests of a module."""
    with start_cluster("--kv-memory-mib", "64") as running:
        yield running
