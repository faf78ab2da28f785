"""The commands and probes of the Helm chart, with real processes: a node without Kubernetes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.ports import free_port
from tests.certificates import Authority
from tests.cluster.by_hand import STOP_S, until
from tests.unit.deploy.chart_kit import ALONE, Pod, environment, expand, pod_of, render

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

PARTS = ("conductor", "kvstore", "prefill", "decode")
HOST = "127.0.0.1"
SECURED: dict[str, Any] = {
    "tls": {
        "internal": {"enabled": True, "existingSecret": "members"},
        "clients": {"enabled": True, "existingSecret": "clients"},
    },
    "apiKeys": {"existingSecret": "tenants"},
}


@dataclass(frozen=True, slots=True)
class Running:
    """A container. `ports`: of this machine, by what the pod calls them."""

    pod: Pod
    process: subprocess.Popen[bytes]
    ports: Mapping[int, int]
    client: httpx.Client

    def passes(self, kind: str) -> bool:
        """As the kubelet sees it."""
        probe = self.pod.container[f"{kind}Probe"]
        if "grpc" in probe:
            return self._serves(probe["grpc"]["port"], probe["grpc"].get("service", ""))
        named = {port["name"]: port["containerPort"] for port in self.pod.container["ports"]}
        with contextlib.suppress(httpx.TransportError):
            asked = probe["httpGet"]
            url = self.url(named[asked["port"]], asked.get("scheme", "HTTP").lower())
            return self.client.get(f"{url}{asked['path']}").is_success
        return False

    def url(self, port: int, scheme: str) -> str:
        return f"{scheme}://{HOST}:{self.ports[port]}"

    def _serves(self, port: int, service: str) -> bool:
        with grpc.insecure_channel(f"{HOST}:{self.ports[port]}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            try:
                answer = check(health_pb2.HealthCheckRequest(service=service), timeout=5.0)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def values(directory: Path) -> dict[str, Any]:
    worker = {"device": "cpu", "extraArgs": ["--kv-memory-mib=64", "--threads=1"]}
    memory = [f"--memory-dir={directory}", "--no-keep-memory"]
    store = {"enabled": True, "memory": {"sizeMiB": 16}, "extraArgs": memory}
    return {**ALONE, "prefill": worker, "decode": worker, "kvstore": store}


@dataclass(frozen=True, slots=True)
class Node:
    """Its containers, and what a client of the conductor needs."""

    containers: dict[str, Running]
    scheme: str
    headers: Mapping[str, str]


@pytest.fixture(params=["open", "secured"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    secured = request.param == "secured"
    key = make_secrets(tmp_path / "etc/baton") if secured else ""
    objects = render({**values(tmp_path), **(SECURED if secured else {})})
    wanted = {8000, 50051, 50053, 50054}
    own = {50052, 50055, 9090}  # of each pod; here they share a host
    containers: dict[str, Running] = {}
    shared = free_ports(wanted)
    trusted = ssl.create_default_context(
        cafile=tmp_path / "etc/baton/tls/ca.crt" if secured else None
    )
    with httpx.Client(trust_env=False, verify=trusted, timeout=100.0) as client:
        try:
            for part in PARTS:
                ports = {**shared, **free_ports(own)}
                containers[part] = start(pod_of(objects, part), ports, tmp_path, client)
            headers = {"authorization": f"Bearer {key}"} if key else {}
            yield Node(containers, "https" if secured else "http", headers)
        finally:
            for each in containers.values():
                each.process.kill()
                each.process.wait(STOP_S)


def make_secrets(directory: Path) -> str:
    """Files as in the Secrets of SECURED. Returns a key for clients."""
    directory.mkdir(parents=True)
    authority = Authority(directory)
    for name, host in (("tls", "baton"), ("client-tls", HOST), ("api-keys", "")):
        (directory / name).mkdir()
        if host:
            pair = authority.issue(host)
            shutil.copy(pair.cert, directory / name / "tls.crt")
            shutil.copy(pair.key, directory / name / "tls.key")
            shutil.copy(authority.ca, directory / name / "ca.crt")
    tenants, keys = directory / "api-keys/tenants.yaml", directory / "api-keys/keys.txt"
    tenants.write_text("tenants: [{name: chat}]")
    command = [sys.executable, "-m", "baton", "keys", "create", "chat", "--file", str(keys)]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    (key,) = re.findall(r"bt-\S+", made.stdout)
    return str(key)


def free_ports(wanted: set[int]) -> dict[int, int]:
    return {port: free_port() for port in wanted}


def start(pod: Pod, ports: Mapping[int, int], directory: Path, client: httpx.Client) -> Running:
    """The container's command, with this machine's ports, itself for the Services, and mounts below
    `directory`."""
    here = {"POD_NAME": pod.component, "POD_IP": HOST, "HOME": str(directory)}
    variables = environment(pod.container) | here
    flags = [expand(flag, variables) for flag in pod.container["args"]]
    flags = [re.sub(r"=baton-(members|kvstore):", f"={HOST}:", flag) for flag in flags]
    flags = [flag.replace("=/etc/baton/", f"={directory}/etc/baton/") for flag in flags]
    for inside, outside in ports.items():
        flags = [re.sub(rf"(=|:){inside}$", rf"\g<1>{outside}", flag) for flag in flags]
    keep = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    with (directory / f"{pod.component}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *pod.container["command"][1:], *flags],
            env=keep | variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    return Running(pod, process, ports, client)


def test_what_the_chart_starts_serves_and_ends(node: Node) -> None:
    running = dict(node.containers)
    conductor = running["conductor"]
    until(lambda: all(each.passes("startup") for each in running.values()))
    until(lambda: all(each.passes("readiness") for each in running.values()))
    assert all(each.passes("liveness") for each in running.values())

    body = {"model": "demo", "prompt": "def fibonacci(n):", "max_tokens": 8}
    url = conductor.url(8000, node.scheme)
    if node.headers:
        assert conductor.client.post(f"{url}/v1/completions", json=body).status_code == 401
    answer = conductor.client.post(f"{url}/v1/completions", json=body, headers=node.headers)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 8
    fleet = conductor.client.get(f"{url}/cluster").json()
    members = fleet["workers"] + fleet["stores"]
    assert {(each["role"], each["node"]) for each in members} == {
        (role, "some-name") for role in ("prefill", "decode", "store")
    }

    # Nobody has a reason to kill those whose conductor has gone.
    conductor.process.send_signal(signal.SIGTERM)
    assert conductor.process.wait(STOP_S) == 0
    del running["conductor"]
    assert all(each.passes("liveness") for each in running.values())
    for each in running.values():
        each.process.send_signal(signal.SIGTERM)
    assert [each.process.wait(STOP_S) for each in running.values()] == [0, 0, 0]
