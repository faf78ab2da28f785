"""A cluster of several conductors over Redis: every process started by its own command line."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from baton.rpc.tls import PEER_NAME
from tests.certificates import Authority
from tests.cluster.conftest import SETTLED, pids_with, wait_until_gone
from tests.redis_server import RedisServer, redis_server

PATIENCE_S = 200.0
STOP_S = 60.0
# As docs/redis.md has it.
ACL = (
    "baton on >{} ~baton:* resetchannels -@all "
    "+@read +@write +@connection +@transaction +@scripting"
)
WORKER_FLAGS = ("--kv-memory-mib", "64", "--dtype", "float32", "--threads", "1")


@dataclass
class Conductor:
    process: subprocess.Popen[str]
    http: str
    for_workers: str

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"http://{self.http}{path}", timeout=30.0, trust_env=False)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(f"http://{self.http}{path}", json=body, timeout=100.0, trust_env=False)

    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["name"]: worker for worker in self.get("/cluster").json()["workers"]}

    def sees_live(self, *names: str) -> bool:
        workers = self.workers()
        return all(name in workers and workers[name]["state"] == "live" for name in names)

    def is_idle(self) -> bool:
        """Every worker is done, and every block is free or cached."""
        return all(
            not worker["running"]
            and not worker["waiting"]
            and {state for state, count in worker["blocks"].items() if count} <= SETTLED
            for worker in self.workers().values()
        )


@dataclass
class ByHand:
    redis: RedisServer
    directory: Path
    secrets: dict[str, str]  # by which all reach Redis, and each other, as variables
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def conductor(self, name: str, *flags: str) -> Conductor:
        process = self._spawn(name, "conductor", "--port", "0", "--grpc-port", "0", *flags)
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        return Conductor(process, said["http"], said["for_workers"])

    def worker(self, role: str, name: str, *flags: str) -> subprocess.Popen[str]:
        return self._spawn(name, f"{role}_worker", *WORKER_FLAGS, *flags)

    def log_of(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def _spawn(self, name: str, module: str, *flags: str) -> subprocess.Popen[str]:
        announce = ("--announce",) if module == "conductor" else ()
        with (self.directory / f"{name}.log").open("a") as log:
            process = self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", module, "--name", name, *announce, *flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if announce else log,
                stderr=log,
                text=True,
                env={
                    **os.environ,
                    "BATON_CLUSTER_TOKEN": self.token,
                    **self.secrets,
                    "BATON_CLUSTER_NAME": "test",
                },
            )
        return process

    def kill(self, name: str) -> None:
        process = self.processes.pop(name)
        process.kill()
        process.wait(STOP_S)
        if process.stdout is not None:
            process.stdout.close()

    def stop_all(self) -> dict[str, int]:
        """SIGTERM to everybody, workers first. Returns the exit codes."""
        codes: dict[str, int] = {}
        for name in sorted(
            self.processes, key=lambda name: self.processes[name].stdout is not None
        ):
            self.processes[name].send_signal(signal.SIGTERM)
            codes[name] = self.processes[name].wait(STOP_S)
        return codes


@contextmanager
def by_hand(directory: Path, secured: bool = False) -> Iterator[ByHand]:
    """Afterwards no process of it is left. `secured`: Redis by TLS, as a user that may use only
    the cluster's keys, and mutual TLS between the processes."""
    password = secrets.token_hex(8)
    authority = Authority(directory) if secured else None
    with redis_server(password, authority, ACL.format(password)) as redis:
        variables = {"BATON_REDIS": redis.url}
        if authority is not None:
            variables = _secured(directory, authority, redis, password)
        cluster = ByHand(redis, directory, variables)
        try:
            yield cluster
        finally:
            left = pids_with(f"BATON_CLUSTER_TOKEN={cluster.token}")
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for name in tuple(cluster.processes):
                cluster.kill(name)
            assert not wait_until_gone(
                lambda: pids_with(f"BATON_CLUSTER_TOKEN={cluster.token}"), STOP_S
            )


def _secured(
    directory: Path, authority: Authority, redis: RedisServer, password: str
) -> dict[str, str]:
    pair = authority.issue(PEER_NAME)
    password_file = directory / "redis-password"
    password_file.write_text(password + "\n")
    return {
        "BATON_REDIS": f"rediss://baton@{redis.address}",
        "BATON_REDIS_PASSWORD_FILE": str(password_file),
        "BATON_REDIS_CA_FILE": str(authority.ca),
        "BATON_REDIS_CERT_FILE": str(pair.cert),
        "BATON_REDIS_KEY_FILE": str(pair.key),
        "BATON_TLS_CERT": str(pair.cert),
        "BATON_TLS_KEY": str(pair.key),
        "BATON_TLS_CA": str(authority.ca),
    }


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
