"""Configuration, sizing and life cycle of worker processes, without starting any."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from baton.config import parse_config
from baton.errors import ConfigError
from baton.types.fleet import KvLayout, Role
from baton.worker.address import reachable_address
from baton.worker.build import (
    choose_device,
    worker_name,
)
from baton.worker.config import WorkerConfig
from baton.worker.lifecycle import StopSignals

LAYOUT = KvLayout("ab", "float32", 2, 2, 16, 32)  # 16 KiB a block


def test_every_flag_has_a_default() -> None:
    assert parse_config(WorkerConfig, [], {}, "prog") == WorkerConfig()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_num_seqs": 0}, "--max-num-seqs must be at least 1"),
        ({"num_blocks": -1}, "--num-blocks must be at least 0"),
        ({"lease_ttl": 0.0}, "--lease-ttl must be more than 0 seconds"),
        ({"listen": "localhost"}, "--listen must be host:port"),
        ({"conductor": ("here",)}, "--conductor must be host:port"),
        ({"conductor": ("there:1", "here:99999")}, "--conductor must be host:port"),
    ],
)
def test_values_that_cannot_work(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorkerConfig(**flags)


@pytest.mark.parametrize(
    ("advertise", "bound", "expected"),
    [
        ("", "127.0.0.1:4000", "127.0.0.1:4000"),
        ("node7", "0.0.0.0:4000", "node7:4000"),
        ("node7:5000", "0.0.0.0:4000", "node7:5000"),
    ],
)
def test_addresses(advertise: str, bound: str, expected: str) -> None:
    assert reachable_address(advertise, bound) == expected


def test_a_worker_on_every_interface_advertises_its_host() -> None:
    host, _, port = reachable_address("", "0.0.0.0:4000").rpartition(":")
    assert host not in ("", "0.0.0.0")
    assert port == "4000"


def test_names() -> None:
    assert worker_name(WorkerConfig(name="x"), Role.PREFILL) == "x"
    assert str(os.getpid()) in worker_name(WorkerConfig(), Role.PREFILL)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda:0"
    assert choose_device("cuda") == "cuda:0"
    assert choose_device("cuda:1") == "cuda:1"
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="torch sees 2 GPUs"):
        choose_device("cuda:2")
    with pytest.raises(ConfigError, match="--device must be"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_ask_once_and_insist_the_second_time(number: signal.Signals) -> None:
    loop = asyncio.get_running_loop()
    signals = StopSignals()
    signals.install()
    try:
        os.kill(os.getpid(), number)
        await asyncio.wait_for(signals.stop.wait(), 5)
        assert not signals.hurry.is_set()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(signals.hurry.wait(), 5)
    finally:
        for handled in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(handled)


def run_python(code: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **more
    )


def test_a_process_ends_with_its_standard_input_even_when_its_loop_is_blocked() -> None:
    code = (
        "import asyncio, time\n"
        "from baton.worker.lifecycle import StopSignals, watch_parent\n"
        "async def main():\n"
        "    StopSignals().install()\n"
        "    watch_parent()\n"
        "    time.sleep(50)\n"
        "asyncio.run(main())\n"
    )
    assert run_python(code, stdin=subprocess.DEVNULL).returncode == 1


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_wrong_flags_are_told_before_torch_is_imported(role: str) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--num-block', '3']\n"
        "try:\n"
        f"    runpy.run_module('{role}_worker', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code, 'torch' in sys.modules)\n"
    )
    done = run_python(code)
    assert done.stdout.split() == ["2", "False"]
    assert "did you mean --num-blocks" in done.stderr


def test_a_missing_token_and_a_missing_conductor_are_told() -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    command = [sys.executable, "-m", "decode_worker"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--conductor host:port is missing" in done.stderr
    command += ["--conductor", "127.0.0.1:1"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "BATON_CLUSTER_TOKEN" in done.stderr
