"""`baton serve --elastic`: workers take the role that the load asks for; answers stay the same."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.cluster.conftest import Cluster, ClusterFactory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

MOVED_S = 120.0
LONG = 1500  # tokens of a prompt that keeps a prefill worker busy


def ask(cluster: Cluster, number: int, length: int = LONG, max_tokens: int = 4) -> Any:
    prompt = [(number * 31 + position * 7) % 250 for position in range(length)]
    body = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    reply = cluster.post("/v1/completions", body)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def roles(cluster: Cluster) -> dict[str, str]:
    workers = cluster.status()["workers"]
    return {worker["name"]: worker["role"] for worker in workers if worker["state"] == "live"}


def pids(cluster: Cluster) -> dict[str, int]:
    return {worker["name"]: worker["pid"] for worker in cluster.status()["workers"]}


def test_a_decode_worker_becomes_a_prefill_worker_under_long_prompts(
    start_cluster: ClusterFactory,
) -> None:
    flags = ("--elastic", "--elastic-settle", "2", "--prefill", "1", "--decode", "2")
    with start_cluster(*flags, "--kv-memory-mib", "64") as cluster:
        before = roles(cluster)
        assert sorted(before.values()) == ["decode", "decode", "prefill"]
        processes = pids(cluster)
        alone = {number: ask(cluster, number) for number in range(4)}
        answers: list[tuple[int, Any]] = []
        deadline = time.monotonic() + MOVED_S
        with ThreadPoolExecutor(4) as clients:
            number = 0
            while sorted(roles(cluster).values()) != ["decode", "prefill", "prefill"]:
                assert time.monotonic() < deadline, cluster.status()
                some = range(number, number + 4)
                answers += zip(some, clients.map(lambda n: ask(cluster, n), some), strict=True)
                number += 4
            some = range(4)
            answers += zip(some, clients.map(lambda n: ask(cluster, n), some), strict=True)
        assert [text for n, text in answers if n in alone] == [
            alone[n] for n, _ in answers if n in alone
        ]
        assert pids(cluster) == processes, "nobody was restarted"
        assert "to prefill" in cluster.status()["conductors"][0]["planner"]["last"]
        cluster.assert_idle()
        assert cluster.stop() == 0
