"""A real Ray cluster for tests: several nodes on this machine, and jobs by Ray's command line.

Never by `ray stop`, which ends all of Ray on the machine: each node is a `ray start --block` of our
own, which ends its processes when it gets SIGTERM.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.cluster.conftest import pids_with, wait_until_gone

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
WHY_NOT = "ray is not installed (pip install 'baton-llm[ray]')"
INSTALLED = importlib.util.find_spec("ray") is not None and RAY.exists()
PATIENCE_S = 240.0
STOP_S = 60.0
_ATTEMPTS = 3  # a raylet gives up when its agents are not up in time, as on a busy machine
_SMALL = ("--num-cpus", "2", "--memory", str(1 << 30), "--object-store-memory", str(80 << 20))


@dataclass
class RayNodes:
    """`dashboard` is where jobs are submitted. The first node is the head."""

    directory: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    gcs_port: int = field(default_factory=lambda: free_port())
    dashboard_port: int = field(default_factory=lambda: free_port())
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    jobs: list[str] = field(default_factory=list)

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def environ(self) -> dict[str, str]:
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("BATON_", "RAY_"))}
        return {
            **ours,
            "BATON_TEST_MARK": self.mark,
            "PATH": f"{RAY.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",  # it would kill for what others use
        }

    def pids(self) -> set[int]:
        return pids_with(f"BATON_TEST_MARK={self.mark}")

    def add(self, resources: dict[str, float], gpus: int = 0) -> None:
        """Start one more node, and wait until Ray knows it."""
        for _ in range(_ATTEMPTS):
            process = self._start(resources, gpus)
            if self._joins(process, len(self.nodes) + 1):
                self.nodes.append(process)
                return
            end(process)
        raise AssertionError(f"no Ray node: {self.log()[-4000:]}")

    def submit(self, directory: Path, *command: str, environ: dict[str, str]) -> Job:
        """`ray job submit --working-dir DIRECTORY -- COMMAND`."""
        name = f"job-{len(self.jobs)}"
        runtime_env = directory.with_suffix(".yaml")
        runtime_env.write_text(json.dumps({"env_vars": environ}))
        self.cli(
            *("submit", "--working-dir", str(directory), "--runtime-env", str(runtime_env)),
            *("--submission-id", name, "--no-wait", "--", *command),
        )
        self.jobs.append(name)
        return Job(self, name)

    def cli(self, *argv: str) -> str:
        """`ray job ...`; it must succeed."""
        done = subprocess.run(
            [str(RAY), "job", argv[0], "--address", self.dashboard, *argv[1:]],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            env=self.environ,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def get(self, path: str) -> Any:
        reply = httpx.get(self.dashboard + path, timeout=30.0, trust_env=False)
        reply.raise_for_status()
        return reply.json()

    def log(self) -> str:
        return (self.directory / "ray.log").read_text(errors="replace")

    def _start(self, resources: dict[str, float], gpus: int) -> subprocess.Popen[bytes]:
        head = (
            *("--head", "--port", str(self.gcs_port), "--temp-dir", str(self.directory)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard_port)),
            *("--ray-client-server-port", str(free_port())),
        )
        join = ("--address", f"127.0.0.1:{self.gcs_port}")
        with (self.directory / "ray.log").open("ab") as log:
            return subprocess.Popen(
                [
                    *(str(RAY), "start", "--block", *(join if self.nodes else head), *_SMALL),
                    *("--num-gpus", str(gpus), "--resources", json.dumps(resources)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                start_new_session=True,
            )

    def _joins(self, process: subprocess.Popen[bytes], count: int) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, KeyError):
                summary = self.get("/nodes?view=summary")["data"]["summary"]
                alive = [node for node in summary if node["raylet"].get("state") == "ALIVE"]
                if len(alive) >= count:
                    return True
            time.sleep(0.3)
        return False


@dataclass
class Job:
    ray: RayNodes
    name: str

    def log(self) -> str:
        return str(self.ray.get(f"/api/jobs/{self.name}/logs")["logs"])

    def status(self) -> str:
        return str(self.ray.get(f"/api/jobs/{self.name}")["status"])

    def events(self) -> list[dict[str, Any]]:
        """What `baton ray up --json` wrote."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def event(self, name: str) -> dict[str, Any]:
        """Wait for an event."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = [event for event in self.events() if event["event"] == name]
            if found:
                return found[0]
            assert self.status() in ("PENDING", "RUNNING"), self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.5)


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """Afterwards no process of it is left."""
    # Not pytest's: paths of sockets may have 107 characters.
    ray = RayNodes(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))
    try:
        yield ray
    finally:
        for node in reversed(ray.nodes):
            end(node)
        left = wait_until_gone(ray.pids, 10.0)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until_gone(ray.pids, STOP_S)
        shutil.rmtree(ray.directory, ignore_errors=True)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)


def free_port() -> int:
    """Outside 10002-19999, where Ray's own workers listen, and outside those that the kernel gives
    away."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
