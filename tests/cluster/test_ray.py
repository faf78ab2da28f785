"""`baton ray up` on a real Ray cluster of several nodes, submitted by Ray's own command line.

One job serves all tests but one, in the order in which they stand here: the last one stops it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.conftest import SETTLED, pids_with, wait_until_gone
from tests.cluster.ray_load import PROMPTS, Answers, Load, ask
from tests.cluster.ray_nodes import (
    INSTALLED,
    PATIENCE_S,
    WHY_NOT,
    Job,
    Machine,
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
AT_A_TIME = 4  # sequences of a decode worker: who asks for more makes the planner want more
CLUSTER: dict[str, Any] = {
    "cluster_name": f"test-{os.getpid()}",
    "engine": {"dtype": "float32"},
    "conductors": {
        **{"port": 0, "grpc_port": 0, "num_cpus": 0.2, "resources": {"conductor": 1}},
        # The planner looks often, and at nothing but whether sequences wait for a place.
        "flags": {"elastic_settle": 1.5, "slo_tpot_ms": 60_000},
    },
    "pools": {
        # Of a GPU that is only in Ray's books.
        "prefill": {
            "num_cpus": 0.2,
            "num_gpus": 0.5,
            "resources": {"prefill": 1},
            "flags": SMALL,
        },
        "decode": {
            **{"replicas": 2, "min_replicas": 2, "max_replicas": 3, "strategy": "SPREAD"},
            **{"num_cpus": 0.2, "resources": {"decode": 1}},
            "flags": {**SMALL, "max_num_seqs": AT_A_TIME},
        },
    },
    "store": {"memory_mib": 32},
    "scale": {"look_s": 0.5, "up_after_s": 1, "down_after_s": 1},
    "timeouts": {"start_s": PATIENCE_S, "place_s": PATIENCE_S, "drain_s": 20},
}


@dataclass(frozen=True)
class Up:
    """A cluster that is ready. `second` is a machine that only has decode workers, and a store."""

    ray: RayNodes
    second: Machine
    job: Job
    url: str
    expected: Answers


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    try:
        with ray_nodes() as ray:
            ray.add({"conductor": 1, "prefill": 1, "decode": 1}, gpus=1)
            second = ray.add({"decode": 2})
            job = start(ray, tmp_path_factory.mktemp("ray"))
            url = str(job.event("ready")["urls"])
            yield Up(ray, second, job, url, {prompt: ask(url, prompt) for prompt in PROMPTS})
    finally:
        for path in memory_of(""):  # of stores that a failed test left behind
            shutil.rmtree(path)


def start(ray: RayNodes, directory: Path) -> Job:
    work = directory / "work"
    work.mkdir()
    (work / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    environ = {"BATON_CLUSTER_TOKEN": TOKEN, "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    return ray.submit(
        work, "baton", "ray", "up", "--json", "--config", "cluster.yaml", environ=environ
    )


def members(url: str) -> dict[str, dict[str, Any]]:
    """Workers and stores that live, by name."""
    cluster = httpx.get(f"{url}/cluster", timeout=30.0, trust_env=False).json()
    found = (*cluster["workers"], *cluster["stores"])
    return {member["name"]: member for member in found if member["state"] == "live"}


def replaced(url: str, name: str, pid: int) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return bool(members(url).get(name, {"pid": pid})["pid"] != pid)
    return False


def memory_of(node: str) -> list[Path]:
    """What the store of a node, or of any, has in /dev/shm."""
    return list(Path("/dev/shm").glob(f"*{CLUSTER['cluster_name']}-*{node.rpartition('-')[2]}"))


def variables(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    return dict(entry.partition("=")[::2] for entry in text.split("\0") if entry)


def arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def parent(pid: int) -> int:
    found = re.search(r"^PPid:\t(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert found is not None
    return int(found[1])


def test_each_process_is_where_its_resources_are(up: Up) -> None:
    placed = [event for event in up.job.events() if event["event"] == "placed"]
    nodes = {event["name"]: event["nodes"] for event in placed}
    live = members(up.url)
    assert nodes["prefill"] == nodes["conductor"] == [live["prefill-0"]["node"]]
    assert len(set(nodes["decode"])) == 2
    assert nodes["decode"] == [live[f"decode-{i}"]["node"] for i in range(2)]
    assert variables(live["prefill-0"]["pid"])["CUDA_VISIBLE_DEVICES"] == "0"
    assert not variables(live["decode-0"]["pid"]).get("CUDA_VISIBLE_DEVICES")
    for node in nodes["decode"]:
        assert live[f"store-{node}"]["node"] == node
    for member in live.values():
        assert {state for state, count in member["blocks"].items() if count} <= SETTLED


def test_a_killed_worker_is_replaced_under_load(up: Up) -> None:
    with Load(up.url) as load:
        load.wait_for_more()
        victim = members(up.url)["decode-0"]["pid"]
        os.kill(victim, signal.SIGKILL)
        until(lambda: replaced(up.url, "decode-0", victim), up.job.log)
        load.wait_for_more()
    load.assert_right(up.expected)
    up.job.event("process_exited", name="decode-0", code=-signal.SIGKILL)
    assert "(decode-0" in up.job.log()  # its lines have its name in front


def test_a_worker_ends_with_rays_process_and_comes_back_in_another(up: Up) -> None:
    victim = members(up.url)["prefill-0"]["pid"]
    actor = parent(victim)
    os.kill(actor, signal.SIGKILL)
    until(lambda: replaced(up.url, "prefill-0", victim), up.job.log)
    assert not Path(f"/proc/{victim}").exists()
    assert parent(members(up.url)["prefill-0"]["pid"]) != actor
    assert ask(up.url, PROMPTS[0]) == up.expected[PROMPTS[0]]


def test_a_pool_grows_with_the_load_and_drains_what_it_gives_back(up: Up) -> None:
    with Load(up.url, pause_s=0.5) as steady:
        with Load(up.url, streams=4 * AT_A_TIME) as surge:
            until(lambda: "decode-2" in members(up.url), up.job.log)
            surge.wait_for_more()
        until(lambda: "decode-2" not in members(up.url), up.job.log)
        steady.wait_for_more()
    steady.assert_right(up.expected)
    surge.assert_right(up.expected)
    assert up.job.event("scaling", before=2)["after"] == 3
    assert up.job.event("scaling", before=3)["after"] == 2
    assert up.job.event("left", name="decode-2")["killed"] is False


def test_a_dead_nodes_worker_moves_and_requests_go_on(up: Up) -> None:
    """Its machine dies; there is no room for it until another machine joins."""
    dead = {name: m for name, m in members(up.url).items() if m["pid"] in up.second.pids()}
    (worker,) = (name for name in dead if name.startswith("decode"))
    (store,) = (name for name in dead if name.startswith("store"))
    with Load(up.url) as load:
        load.wait_for_more()
        up.ray.lose(up.second)
        load.wait_for_more()
    for path in memory_of(dead[worker]["node"]):  # goes with a machine
        shutil.rmtree(path)
    with Load(up.url, pause_s=0.5) as later:
        why = up.job.event("waiting", name=worker)["what"]
        machine = up.ray.add({"decode": 2})
        until(lambda: replaced(up.url, worker, dead[worker]["pid"]), up.job.log)
        later.wait_for_more()
    load.assert_right(up.expected)
    later.assert_right(up.expected)
    assert re.search(rf"{worker} needs 1 x .*; node \S+ has 0 of 1 decode left$", why), why
    moved = members(up.url)[worker]
    assert moved["pid"] in machine.pids()
    told = arguments(moved["pid"])
    address = told[told.index("--store") + 1]
    beside = members(up.url)[f"store-{moved['node']}"]
    assert f"0.0.0.0:{address.rpartition(':')[2]}" in arguments(beside["pid"])
    assert up.job.event("moved", name=worker)["node"] == moved["node"]
    up.job.event("node_gone", name=store)


def test_a_cluster_that_fits_nowhere_fails_with_the_reason(up: Up, tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    pools = {"decode": {"num_gpus": 4}}
    content = {"pools": pools, "conductors": {"num_cpus": 0}, "timeouts": {"place_s": 1}}
    (work / "cluster.yaml").write_text(yaml.safe_dump(content))
    job = up.ray.submit(work, "baton", "ray", "up", environ={})
    until(lambda: job.status() == "FAILED", job.log)
    assert "not placed after 1 s:\n  decode needs 1 x (CPU 1, GPU 4); node " in job.log()
    assert "has 1 of 1 GPU left" in job.log()


def test_a_stop_drains_and_leaves_nothing(up: Up) -> None:
    up.ray.cli("stop", up.job.name)
    assert up.job.status() == "STOPPED"
    assert up.job.event("stopped")["killed"] == [], up.job.log()
    assert not wait_until_gone(lambda: pids_with(f"BATON_CLUSTER_TOKEN={TOKEN}"), PATIENCE_S)
    assert not memory_of("")
