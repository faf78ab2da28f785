"""`baton ray up` on a real Ray cluster of two nodes, submitted by Ray's own command line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.conftest import SETTLED, pids_with, wait_until_gone
from tests.cluster.ray_nodes import (
    INSTALLED,
    PATIENCE_S,
    WHY_NOT,
    Job,
    RayNodes,
    ray_nodes,
    until,
)

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not INSTALLED, reason=WHY_NOT),
    pytest.mark.timeout(900),
]

TOKEN = "a-token-of-this-test"
SMALL = {"kv_memory_mib": 64, "threads": 1, "device": "cpu"}
CLUSTER: dict[str, Any] = {
    "cluster_name": f"test-{os.getpid()}",
    "engine": {"dtype": "float32"},
    "conductors": {"port": 0, "grpc_port": 0, "num_cpus": 0.2},
    "pools": {
        # Of a GPU that is only in Ray's books.
        "prefill": {
            "num_cpus": 0.2,
            "num_gpus": 0.5,
            "resources": {"prefill": 1},
            "flags": SMALL,
        },
        "decode": {"replicas": 2, "num_cpus": 0.2, "resources": {"decode": 1}, "flags": SMALL},
    },
    "store": {"memory_mib": 32},
    "timeouts": {"start_s": PATIENCE_S, "place_s": PATIENCE_S, "drain_s": 20},
}
PROMPTS = ("def fibonacci(n):", "import os\n", "class Stack:\n", "for i in range(10):")
TOKENS = 40


@pytest.fixture(scope="module")
def ray() -> Iterator[RayNodes]:
    with ray_nodes() as nodes:
        nodes.add({"prefill": 1}, gpus=1)
        nodes.add({"decode": 2})
        yield nodes


class Load:
    """Streams the same prompts again and again, and keeps the answers."""

    def __init__(self, url: str) -> None:
        self.answers: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self._url = url
        self._enough = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(prompt,)) for prompt in PROMPTS
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)

    def _ask_on(self, prompt: str) -> None:
        while not self._enough.is_set():
            try:
                self.answers.append((prompt, ask(self._url, prompt)))
            except (httpx.HTTPError, AssertionError) as error:
                self.errors.append(f"{prompt!r}: {error}")


def ask(url: str, prompt: str) -> str:
    body = {
        **{"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0},
        **{"ignore_eos": True, "seed": 1},
    }
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=100.0, trust_env=False)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] == TOKENS
    return str(reply.json()["choices"][0]["text"])


def workers(url: str) -> dict[str, dict[str, Any]]:
    cluster = httpx.get(f"{url}/cluster", timeout=30.0, trust_env=False).json()
    members = (*cluster["workers"], *cluster["stores"])
    return {member["name"]: member for member in members if member["state"] == "live"}


def replaced(url: str, name: str, pid: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return workers(url).get(name, {"pid": pid})["pid"] != pid
    return False


def variables(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(entry.partition("=")[::2] for entry in text.split("\0") if entry)


def parent(pid: int) -> int:
    found = re.search(r"^PPid:\t(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def start(ray: RayNodes, directory: Path) -> Job:
    work = directory / "work"
    work.mkdir()
    (work / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    environ = {"BATON_CLUSTER_TOKEN": TOKEN, "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    return ray.submit(
        work, "baton", "ray", "up", "--json", "--config", "cluster.yaml", environ=environ
    )


def test_a_cluster_serves_survives_deaths_and_leaves_nothing(ray: RayNodes, tmp_path: Path) -> None:
    job = start(ray, tmp_path)
    url = str(job.event("ready")["urls"])
    assert_placed(job, workers(url))
    expected = {prompt: ask(url, prompt) for prompt in PROMPTS}

    with Load(url) as load:
        until(lambda: len(load.answers) >= len(PROMPTS), "nothing is answered")
        victim = workers(url)["decode-0"]["pid"]
        os.kill(victim, signal.SIGKILL)
        until(lambda: replaced(url, "decode-0", victim), job.log())
        after = len(load.answers)
        until(lambda: len(load.answers) >= after + len(PROMPTS), "nothing is answered any more")
    assert not load.errors
    assert {(prompt, expected[prompt]) for prompt in PROMPTS} == set(load.answers)

    # Ray's own process dies: the worker ends with it, and comes back in another one.
    victim = workers(url)["prefill-0"]["pid"]
    actor = parent(victim)
    os.kill(actor, signal.SIGKILL)
    until(lambda: replaced(url, "prefill-0", victim), job.log())
    assert not Path(f"/proc/{victim}").exists()
    assert parent(workers(url)["prefill-0"]["pid"]) != actor
    assert ask(url, PROMPTS[0]) == expected[PROMPTS[0]]

    ray.cli("stop", job.name)
    assert job.status() == "STOPPED"
    stopped = job.event("stopped")
    assert stopped["killed"] == [], job.log()
    assert not wait_until_gone(lambda: pids_with(f"BATON_CLUSTER_TOKEN={TOKEN}"), PATIENCE_S)
    assert not list(Path("/dev/shm").glob(f"*{CLUSTER['cluster_name']}*"))
    died = [event["name"] for event in job.events() if event["event"] == "process_exited"]
    assert died == ["decode-0", "prefill-0"]
    assert "(decode-0" in job.log()  # its lines have its name in front


def assert_placed(job: Job, members: dict[str, dict[str, Any]]) -> None:
    """Each where its resources are, with its GPU and the store of its own node."""
    nodes = {event["name"]: event["nodes"] for event in job.events() if event["event"] == "placed"}
    assert len({*nodes["prefill"], *nodes["decode"]}) == 2
    assert nodes["decode"][0] == nodes["decode"][1]
    assert members["prefill-0"]["node"] == nodes["prefill"][0]
    assert {members[f"decode-{i}"]["node"] for i in range(2)} == set(nodes["decode"])
    stores = {name: member["node"] for name, member in members.items() if "store" in name}
    assert sorted(stores.values()) == sorted({*nodes["prefill"], *nodes["decode"]})
    assert variables(members["prefill-0"]["pid"])["CUDA_VISIBLE_DEVICES"] == "0"
    assert not variables(members["decode-0"]["pid"]).get("CUDA_VISIBLE_DEVICES")
    for member in members.values():
        assert {state for state, count in member["blocks"].items() if count} <= SETTLED


def test_a_cluster_that_fits_nowhere_fails_with_the_reason(ray: RayNodes, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    pools = {"decode": {"num_gpus": 4}}
    content = {"pools": pools, "conductors": {"num_cpus": 0}, "timeouts": {"place_s": 5}}
    (work / "cluster.yaml").write_text(yaml.safe_dump(content))
    job = ray.submit(work, "baton", "ray", "up", environ={})
    until(lambda: job.status() == "FAILED", job.log())
    assert "not placed after 5 s:\n  decode needs 1 x (CPU 1, GPU 4); node " in job.log()
    assert "has 1 of 1 GPU left" in job.log()
