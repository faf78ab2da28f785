"""`python -m conductor` as a real process: announcement, endings, imports, configuration."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from baton.config import parse_config
from baton.errors import ConfigError
from conductor.admission import Slos
from conductor.config import ConductorConfig
from conductor.estimate import Fetch
from conductor.policies import RoutePolicy
from conductor.router import RouteOptions
from conductor.server import listen

ENVIRON = {**os.environ, "BATON_CLUSTER_TOKEN": "secret"}
COMMAND = [sys.executable, "-m", "conductor", "--port", "0", "--grpc-port", "0", "--announce"]


@contextmanager
def conductor(*flags: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, object]]]:
    with subprocess.Popen(
        [*COMMAND, *flags],
        env=ENVIRON,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_it_announces_its_addresses_and_ends_on_sigterm() -> None:
    with conductor("--model-name", "demo") as (process, event):
        assert event["event"] == "listening"
        assert event["pid"] == process.pid
        assert str(event["grpc"]).startswith("127.0.0.1:")
        with urllib.request.urlopen(f"http://{event['http']}/v1/models", timeout=10) as reply:
            assert json.load(reply)["data"][0]["id"] == "demo"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_it_stays_on_its_cpus() -> None:
    cpu = min(os.sched_getaffinity(0))
    with conductor("--cpus", str(cpu)) as (process, _):
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            assert os.sched_getaffinity(int(thread.name)) == {cpu}


async def test_http_connections_send_at_once() -> None:
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_connect(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with listen("127.0.0.1", 0) as listener:
        async with await asyncio.start_server(on_connect, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(accepted, 10)
            writer.close()


def test_the_garbage_collector_leaves_what_was_loaded_alone() -> None:
    script = "import gc; from conductor.__main__ import spare_what_is_loaded as spare; spare(); "
    script += "print(gc.get_freeze_count() > 10_000, len(gc.get_objects()) < 1_000)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["True", "True"]


def test_it_ends_with_its_parent() -> None:
    with conductor("--exit-with-parent") as (process, _):
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--prot", "1"], "did you mean"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    ],
)
def test_wrong_options_end_with_one_clear_line(flags: list[str], message: str) -> None:
    done = subprocess.run(
        [*COMMAND, *flags], env=ENVIRON, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_no_cluster_token_is_a_clear_error() -> None:
    environ = {key: value for key, value in ENVIRON.items() if key != "BATON_CLUSTER_TOKEN"}
    done = subprocess.run(
        COMMAND, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "BATON_CLUSTER_TOKEN" in done.stderr


def test_the_conductor_imports_no_tensor_library() -> None:
    code = (
        "import sys, conductor.__main__, baton.tokenizer\n"
        "print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "flags",
    [
        ["--port", "70000"],
        ["--max-queue", "0"],
        ["--lease-ttl", "-1"],
        ["--drain-timeout", "-1"],
        ["--log-level", "loud"],
        ["--policy", "best"],
        ["--local-prefill-tokens", "some"],
        ["--slo-ttft-ms", "-1"],
        ["--slo-tpot-ms", "-1"],
        ["--prefix-map-blocks", "0"],
    ],
)
def test_values_out_of_range(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=flags[0]):
        parse_config(ConductorConfig, flags, {}, "conductor")


def test_routing_options() -> None:
    config = parse_config(ConductorConfig, [], {}, "conductor")
    assert (config.routing, config.slos) == (RouteOptions(), Slos())
    flags = ["--policy", "random", "--local-prefill-tokens", "0", "--slo-ttft-ms", "250"]
    flags.append("--no-kv-fetch")
    config = parse_config(ConductorConfig, flags, {"BATON_SLO_TPOT_MS": "40"}, "conductor")
    assert config.routing == RouteOptions(RoutePolicy.RANDOM, 0, Fetch.NOBODY)
    assert config.slos == Slos(0.25, 0.04)


def test_options_from_flags_and_environment() -> None:
    config = parse_config(
        ConductorConfig, ["--api-key", "a,b", "--announce"], {"BATON_PORT": "1"}, "conductor"
    )
    assert config.api_key == ("a", "b")
    assert config.port == 1
    assert config.announce


def test_one_port_for_http_and_grpc_is_a_clear_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-m", "conductor", "--port", port, "--grpc-port", port],
        env=ENVIRON,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"conductor: cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
