"""A real Ray cluster for tests: several nodes on this machine, and jobs by Ray's command line.

Never by `ray stop`, which ends all of Ray on the machine: each node is a `ray start --block` of our
own, which ends its processes when it gets SIGTERM.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
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

from bench.ports import free_port
from tests.cluster.conftest import pids_with

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")
WHY_NOT = "ray is not installed (pip install 'baton-llm[ray]')"
INSTALLED = importlib.util.find_spec("ray") is not None and RAY.exists()
PATIENCE_S = 240.0
STOP_S = 60.0
_ATTEMPTS = 3  # a raylet gives up when its agents are not up in time, as on a busy machine
_SMALL = ("--num-cpus", "2", "--memory", str(1 << 30), "--object-store-memory", str(80 << 20))
_FOR_TESTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill for what others use
    "RAY_enable_worker_prestart": "0",  # ours have an environment of their own
    "RAY_prestart_worker_first_driver": "0",
    # A node that does not answer is dead after three seconds; by default after fifteen. One that
    # is only slow has as long as ever.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True)
class Machine:
    """A pretended one: a raylet and all that it started. `process` is `ray start --block`."""

    name: str
    process: subprocess.Popen[bytes]

    def pids(self) -> set[int]:
        """What Ray started there, and what that started in sessions of its own."""
        return in_session(self.process.pid) | pids_with(f"TEST_NODE={self.name}")


@dataclass
class RayNodes:
    """`dashboard` is where jobs are submitted. The first node is the head. Every process on a node
    has `TEST_NODE`, a name of that node, in its environment."""

    directory: Path
    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    gcs_port: int = field(default_factory=lambda: free_port())
    dashboard_port: int = field(default_factory=lambda: free_port())
    nodes: list[Machine] = field(default_factory=list)
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
            **_FOR_TESTS,
        }

    def pids(self) -> set[int]:
        return pids_with(f"BATON_TEST_MARK={self.mark}").union(*(m.pids() for m in self.nodes))

    def add(self, resources: dict[str, float], gpus: int = 0) -> Machine:
        """Start one more node, and wait until Ray knows it."""
        for _ in range(_ATTEMPTS):
            machine = self._start(resources, gpus)
            if self._joins(machine.process, len(self.nodes) + 1):
                self.nodes.append(machine)
                return machine
            end(machine.process)
        raise AssertionError(f"no Ray node: {self.log()[-4000:]}")

    def lose(self, machine: Machine) -> None:
        """End all that runs there at once, as the death of a machine does, and wait until Ray has
        noticed."""
        self.nodes.remove(machine)
        kill(machine.pids)
        machine.process.wait(STOP_S)
        until(lambda: self.alive() == len(self.nodes), self.log)

    def alive(self) -> int:
        """Nodes that Ray takes to be alive."""
        nodes = self.get("/api/v0/nodes")["data"]["result"]["result"]
        return sum(node["state"] == "ALIVE" for node in nodes)

    def submit(self, directory: Path, *command: str, environ: dict[str, str]) -> Job:
        """`ray job submit --working-dir DIRECTORY -- COMMAND`."""
        name = f"job-{len(self.jobs)}"
        runtime_env = directory.with_suffix(".yaml")
        runtime_env.write_text(json.dumps({"env_vars": environ}))
        argv = (
            *("submit", "--working-dir", str(directory), "--runtime-env", str(runtime_env)),
            *("--submission-id", name, "--no-wait", "--", *command),
        )

        def submitted() -> bool:
            done = self._job_command(*argv)
            if "No available agent to submit job, please try again" in done.stderr:
                return False  # Ray's agent begins after its raylet
            assert done.returncode == 0, done.stdout + done.stderr
            return True

        until(submitted, self.log)
        self.jobs.append(name)
        return Job(self, name)

    def cli(self, *argv: str) -> str:
        """`ray job ...`; it must succeed."""
        done = self._job_command(*argv)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _job_command(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(RAY), "job", argv[0], "--address", self.dashboard, *argv[1:]],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
            env=self.environ,
        )

    def get(self, path: str) -> Any:
        reply = httpx.get(self.dashboard + path, timeout=30.0, trust_env=False)
        reply.raise_for_status()
        return reply.json()

    def log(self) -> str:
        return (self.directory / "ray.log").read_text(errors="replace")

    def _start(self, resources: dict[str, float], gpus: int) -> Machine:
        head = (
            *("--head", "--port", str(self.gcs_port), "--temp-dir", str(self.directory)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard_port)),
            *("--ray-client-server-port", str(free_port())),
        )
        # One reads the logs of all: they are in one directory.
        join = ("--address", f"127.0.0.1:{self.gcs_port}", "--include-log-monitor", "false")
        name = secrets.token_hex(8)
        with (self.directory / "ray.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *(str(RAY), "start", "--block", *(join if self.nodes else head), *_SMALL),
                    *("--num-gpus", str(gpus), "--resources", json.dumps(resources)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environ, "TEST_NODE": name},
                start_new_session=True,
            )
        return Machine(name, process)

    def _joins(self, process: subprocess.Popen[bytes], count: int) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError, KeyError):
                if self.alive() >= count:
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

    def event(self, which: str, /, **fields: Any) -> dict[str, Any]:
        """Wait for the first event of that name with these fields."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for event in self.events():
                if event["event"] == which and fields.items() <= event.items():
                    return event
            assert self.status() in ("PENDING", "RUNNING"), self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)


@contextmanager
def ray_nodes() -> Iterator[RayNodes]:
    """Afterwards no process of it is left."""
    # Not pytest's: paths of sockets may have 107 characters.
    ray = RayNodes(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")))
    try:
        yield ray
    finally:
        # Ray's own way takes it seven seconds.
        kill(ray.pids)
        for node in ray.nodes:
            node.process.wait(STOP_S)
        shutil.rmtree(ray.directory, ignore_errors=True)


def in_session(session: int) -> set[int]:
    """Those that run. Some processes of Ray overwrite their environment with their title, and are
    found only so."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = path.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.add(int(path.parent.name))
    return found


def kill(find: Callable[[], set[int]]) -> None:
    """All that it finds, and what they start meanwhile."""

    def killed() -> bool:
        pids = find()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    until(killed, lambda: f"processes are left: {find()}")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)


def until(holds: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    """Wait; what `otherwise` says is said when it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)
