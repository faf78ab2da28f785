"""A node's store outlives the workers, and finds its blocks again when it was killed itself."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import Cluster, ClusterFactory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

BLOCK = 32
BLOCKS = 60  # fetching few might not be worth it: then they are computed again
PROMPT = [4 + number % 3000 for number in range(BLOCKS * BLOCK + 5)]
FLAGS = ("--store-memory-mib", "32", "--kv-memory-mib", "64", "--block-size", str(BLOCK))
PATIENCE_S = 60.0


def complete(cluster: Cluster, prompt: list[int], **more: Any) -> dict[str, Any]:
    """The response, as soon as there is one."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, **more}
    deadline = time.monotonic() + PATIENCE_S
    while True:
        response = cluster.post("/v1/completions", body | {"return_token_ids": True})
        if response.status_code == 200:
            break
        assert time.monotonic() < deadline, response.text
        time.sleep(0.2)  # a worker is being started again
    return dict(response.json())


def told(response: dict[str, Any]) -> tuple[list[int], int]:
    """The answer, and how many prompt tokens were not computed for it."""
    cached = response["usage"]["prompt_tokens_details"]["cached_tokens"]
    return response["choices"][0]["token_ids"], cached


def ask(cluster: Cluster, prompt: list[int], **more: Any) -> tuple[list[int], int]:
    return told(complete(cluster, prompt, **more))


def began_early(cluster: Cluster, request_id: str) -> bool:
    """Whether the prompt was being computed before all of its fetched prefix had come."""
    spans = cluster.get(f"/trace/{request_id}").json()["spans"]
    (fetch,) = (span for span in spans if span["name"] == "fetch")
    return any(
        (span["source"], span["name"]) == (fetch["source"], "prefill")
        and fetch["start_s"] < span["start_s"] < fetch["end_s"]
        for span in spans
    )


def member(cluster: Cluster, kind: str, name: str) -> dict[str, Any]:
    found = [one for one in cluster.status()[kind] if one["name"] == name]
    return dict(found[0]) if found else {}


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def kill(cluster: Cluster, kind: str, name: str) -> None:
    """kill -9, and wait until the process that is started in its place is live."""
    pid = member(cluster, kind, name)["pid"]
    os.kill(pid, signal.SIGKILL)

    def replaced() -> bool:
        now = member(cluster, kind, name)
        return bool(now) and now["pid"] != pid and now["state"] == "live"

    until(replaced)


def stored(cluster: Cluster) -> int:
    blocks = member(cluster, "stores", "store-0")["blocks"]  # none before its first report
    return int(blocks.get("cached", 0))


@pytest.fixture(scope="module")
def cluster_with_store(
    start_cluster: ClusterFactory, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    disk = tmp_path_factory.mktemp("nvme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_EARLY_PREFILL", "on")
        with start_cluster(*FLAGS, "--store-dir", str(disk)) as cluster:
            yield cluster, disk


def test_kv_outlives_the_workers_and_the_store(cluster_with_store: tuple[Cluster, Path]) -> None:
    cluster, _ = cluster_with_store
    answer, cached = ask(cluster, PROMPT)
    assert cached == 0
    until(lambda: stored(cluster) >= BLOCKS)

    for name in ("prefill-0", "decode-0"):  # and with them every pool
        kill(cluster, "workers", name)
    response = complete(cluster, PROMPT)
    assert told(response) == (answer, BLOCKS * BLOCK)
    assert began_early(cluster, response["id"])

    kill(cluster, "stores", "store-0")
    until(lambda: stored(cluster) >= BLOCKS)
    for name in ("prefill-0", "decode-0"):
        kill(cluster, "workers", name)
    again, cached = ask(cluster, PROMPT)
    assert (again, cached) == (answer, BLOCKS * BLOCK)


def test_an_answer_is_found_by_the_next_turn_after_a_crash(
    cluster_with_store: tuple[Cluster, Path],
) -> None:
    cluster, _ = cluster_with_store
    before = stored(cluster)
    prompt = PROMPT[::-1][:-9]  # the last full block ends in the answer
    answer, _ = ask(cluster, prompt)
    assert len(answer) == 8
    until(lambda: stored(cluster) >= before + BLOCKS)
    for name in ("prefill-0", "decode-0"):
        kill(cluster, "workers", name)
    _, cached = ask(cluster, [*prompt, *answer, 5, 6, 7])
    assert cached == BLOCKS * BLOCK
