"""`baton serve` from its first to its last process."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import (
    Cluster,
    ClusterFactory,
    pids_with,
    run_cli,
    serve,
    wait_until_gone,
)

pytestmark = pytest.mark.cluster


def test_ready_means_that_a_request_succeeds(cluster: Cluster) -> None:
    answer = cluster.post("/v1/completions", {"model": "demo", "prompt": "def f", "max_tokens": 4})
    assert answer.status_code == 200
    assert cluster.ready["model"] == "demo"
    assert cluster.get("/ready").status_code == 200


def test_status_lists_every_process(cluster: Cluster) -> None:
    done = cluster.cli("status", "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert set(status) >= {"conductors", "workers", "stores"}
    members = [*status["conductors"], *status["workers"]]
    assert {member["role"] for member in members} == {"conductor", "prefill", "decode"}
    for member in members:
        assert member["name"]
        assert member["address"].rsplit(":", 1)[1].isdigit()
        assert member["state"] == "live"
        assert member["pid"] in cluster.pids()
    for worker in status["workers"]:
        assert set(worker["blocks"]) >= {"free", "active", "cached", "leased", "quarantined"}
        assert sum(worker["blocks"].values()) > 0
    table = cluster.cli("status").stdout
    assert all(member["name"] in table for member in members)


def test_top_shows_the_blocks(cluster: Cluster) -> None:
    done = cluster.cli("top", "--once")
    assert done.returncode == 0, done.stderr
    assert "decode-0" in done.stdout
    assert "blocks in use" in done.stdout


def test_generate_prints_the_answer_and_its_timing(cluster: Cluster) -> None:
    done = cluster.cli("generate", "def fibonacci(n):", "--max-tokens", "8", "--timing")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "TTFT" in done.stderr
    assert "8 tokens" in done.stderr


def test_generate_as_json_and_its_trace(cluster: Cluster) -> None:
    done = cluster.cli("generate", "def fibonacci(n):", "--max-tokens", "8", "--json")
    answer = json.loads(done.stdout)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["finish_reason"] == "length"
    traced = json.loads(cluster.cli("trace", answer["request_id"], "--json").stdout)
    assert traced["output_tokens"] == 8
    assert answer["request_id"] in cluster.cli("trace", answer["request_id"]).stdout


@pytest.mark.parametrize(
    "argv",
    [
        ("generate", "x", "--max-tokens", "-1"),
        ("generate", "x", "--temperature", "-1"),
        ("generate", "word " * 9000),
        ("trace", "no-such-request"),
    ],
    ids=["max-tokens", "temperature", "too-long", "trace"],
)
def test_an_error_is_one_line_and_a_failure(cluster: Cluster, argv: tuple[str, ...]) -> None:
    done = cluster.cli(*argv)
    assert done.returncode == 1
    assert done.stderr.startswith("baton: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_chat_keeps_the_conversation(cluster: Cluster) -> None:
    done = cluster.cli("chat", "--max-tokens", "4", stdin="hello\n\n/reset\nagain\n")
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stderr


def test_bench_counts_what_it_asked_for(cluster: Cluster) -> None:
    shape = ("--input-tokens", "24", "--output-tokens", "6", "--warmup", "1", "--requests", "4")
    for mode in (("--concurrency", "2"), ("--rate", "50")):
        done = cluster.cli(
            "bench", "serve", *shape, *mode, "--slo-ttft", "60000", "--json", "-"
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (run,) = json.loads(done.stdout)["runs"].values()
        assert (run["requests"], run["failed"]) == (4, 0)
        assert (run["prompt_tokens"], run["output_tokens"], run["good"]) == (96, 24, 4)
        assert run["ttft_s"]["p99"] > 0
        assert run["tpot_s"]["p50"] > 0


def test_ctrl_c_lets_running_requests_finish(start_cluster: ClusterFactory) -> None:
    answers: list[Any] = []
    with start_cluster("--kv-memory-mib", "64", "--drain-timeout", "50") as cluster:
        body = {"model": "demo", "prompt": "def f", "max_tokens": 300, "ignore_eos": True}
        asking = threading.Thread(
            target=lambda: answers.append(cluster.post("/v1/completions", body))
        )
        asking.start()
        deadline = time.monotonic() + 30
        while not any(worker["running"] for worker in cluster.status()["workers"]):
            assert time.monotonic() < deadline
        assert cluster.stop(signal.SIGINT) == 0
        asking.join(30)
    assert answers[0].status_code == 200
    assert answers[0].json()["usage"]["completion_tokens"] == 300


def test_children_end_when_serve_is_killed(tmp_path: Path) -> None:
    with serve(tmp_path / "home", "--kv-memory-mib", "64") as cluster:
        assert len(cluster.pids()) >= 4
        cluster.stop(signal.SIGKILL)
        assert not wait_until_gone(cluster.pids, 10.0)


def test_a_killed_worker_is_started_again(start_cluster: ClusterFactory) -> None:
    with start_cluster("--colocated", "--kv-memory-mib", "64") as cluster:
        (worker,) = cluster.status()["workers"]
        os.kill(worker["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not any(
            new["pid"] != worker["pid"] and new["state"] == "live"
            for new in cluster.status()["workers"]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answer = cluster.post("/v1/completions", {"model": "demo", "prompt": "x", "max_tokens": 2})
        assert answer.status_code == 200


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = run_cli("serve", str(tmp_path / "nothing"), "--port", "0", "--grpc-port", "0")
    assert done.returncode == 1
    assert "neither a model directory nor a hub id" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("--port", "--grpc-port", "--metrics-port"):
            flags = {"--port": "0", "--grpc-port": "0"} | {flag: str(port)}
            done = run_cli("serve", *(word for pair in flags.items() for word in pair))
            assert done.returncode == 1
            assert f"{port} is in use; choose another with {flag}" in done.stderr


def test_a_worker_that_refuses_its_flags_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CLUSTER_TOKEN", "refused-flags")
    done = run_cli("serve", "--port", "0", "--grpc-port", "0", "--block-size", "7")
    assert done.returncode == 1
    assert "block size" in done.stderr.lower().replace("_", " ").replace("-", " ")
    assert not wait_until_gone(lambda: pids_with("BATON_CLUSTER_TOKEN=refused-flags"), 10.0)


def test_a_pool_that_the_machine_cannot_hold_is_refused() -> None:
    flags = ("--port", "0", "--grpc-port", "0", "--colocated", "--kv-memory-mib", str(1 << 30))
    done = run_cli("serve", *flags)
    assert done.returncode == 1
    assert "a KV pool of 1073741824 MiB does not fit" in done.stderr
    assert "--kv-memory-mib" in done.stderr


def test_more_than_the_pool_holds_waits_and_more_than_it_can_ever_hold_is_refused(
    start_cluster: ClusterFactory,
) -> None:
    with start_cluster("--colocated", "--num-blocks", "8") as cluster:
        statuses: list[int] = []

        def ask(number: int) -> None:  # each needs 5 of the 8 blocks in the end
            body = {"model": "demo", "prompt": [5 + number] * 100, "max_tokens": 40}
            answer = cluster.post("/v1/completions", body | {"ignore_eos": True})
            statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 12
        body = {"model": "demo", "prompt": [5] * 300, "max_tokens": 1}
        refused = cluster.post("/v1/completions", body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "--kv-memory-mib" in refused.json()["error"]["message"]
        cluster.assert_idle()


def test_doctor_finds_that_this_machine_can_serve() -> None:
    done = run_cli("doctor", "--json")
    assert done.returncode == 0, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["torch"]["verdict"] == "ok"
    assert "shm" in checks["transports"]["detail"]


def test_commands_without_a_cluster_say_so() -> None:
    for argv in (("status",), ("generate", "x"), ("top", "--once"), ("trace", "x")):
        done = run_cli(*argv, "--url", "http://127.0.0.1:9")
        assert done.returncode == 1
        assert "baton serve" in done.stderr
