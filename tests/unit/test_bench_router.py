"""`python -m conductor.bench_router` measures a small cluster, to a table and to JSON."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import orjson
import pytest
import typer
from typer.testing import CliRunner

from baton.errors import ConfigError, InternalError
from conductor import (
    bench_decisions,
    bench_keys,
    bench_map,
    bench_policies,
    bench_relay,
    bench_tenants,
    bench_tls,
)
from conductor.bench_puppet import TOKEN_TEXT, Pace
from conductor.bench_relay import Rig
from conductor.bench_router import PARTS, bench_router
from tests.certificates import Authority
from tests.fake_worker import Script, fake_server

app = typer.Typer()
app.command()(bench_router)
SMALL = ("--workers", "20", "--blocks", "20000", "--prompt-tokens", "4096")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_map, "SINGLE_EVENTS", 10)
    monkeypatch.setattr(bench_map, "STEADY_EVENTS", 20)
    monkeypatch.setattr(bench_decisions, "ROUNDS", 10)
    for name in ("SHORT_REQUESTS", "STREAMED_REQUESTS", "ALONE", "STREAM_TOKENS", "PACED_TOKENS"):
        monkeypatch.setattr(bench_relay, name, 8)
    monkeypatch.setattr(bench_relay, "STREAMS", 4)
    monkeypatch.setattr(bench_relay, "WARM_UP", 1)
    monkeypatch.setattr(bench_relay, "cpu_seconds", lambda pid: time.perf_counter())  # has 10 ms
    for name, value in (("REQUESTS", 4), ("STREAMS", 4), ("STREAM_TOKENS", 4), ("ALONE", 2)):
        monkeypatch.setattr(bench_tls, name, value)
    monkeypatch.setattr(bench_tls, "ROUNDS", 1)
    monkeypatch.setattr(bench_keys, "GROUPS", 200)
    monkeypatch.setattr(bench_keys, "ROUNDS", 3)
    monkeypatch.setattr(bench_policies, "PAIRS", (1,))
    monkeypatch.setattr(bench_tenants, "TICK_S", 1.0)
    for name, value in (("KEYS", 12), ("TENANTS", 6), ("CALLS", 20), ("REDIS_CALLS", 20)):
        monkeypatch.setattr(bench_tenants, name, value)


def test_every_part_has_figures(tmp_path: Path) -> None:
    target = tmp_path / "figures.json"
    result = CliRunner().invoke(app, [*SMALL, "--json", str(target)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "memory per block" in result.stdout
    report = orjson.loads(target.read_bytes())
    assert report["plan"]["blocks"] == 20_000
    figures = {figure["name"]: figure["value"] for figure in report["results"]}
    assert len({figure["part"] for figure in report["results"]}) == len(PARTS) - 1  # but for tls
    assert all(value >= 0 for value in figures.values())
    assert figures["holders in its answer"] == 20
    assert figures["blocks that found no room"] == 0


def test_limits_are_exact() -> None:
    result = CliRunner().invoke(app, [*SMALL, "--parts", "tenants", "--json", "-"])
    assert result.exit_code == 0, result.output
    figures = {figure["name"]: figure["value"] for figure in orjson.loads(result.stdout)["results"]}
    beyond = [value for name, value in figures.items() if name.endswith("beyond the limit")]
    below = [value for name, value in figures.items() if name.endswith("below it")]
    assert len(beyond) == len(below) == (6 if shutil.which("redis-server") else 3)
    assert set(beyond) == {0.0}
    assert max(below) <= 1.0


def test_tls_next_to_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (bench_tls.PLAIN, bench_tls.CASES[-1])
    monkeypatch.setattr(bench_tls, "CASES", cases)
    monkeypatch.setattr(bench_tls, "PAIRS", 1)
    authority = Authority(tmp_path)
    pair = authority.issue("baton")
    files = ("--tls-cert", str(pair.cert), "--tls-key", str(pair.key), "--tls-ca")
    arguments = [*SMALL, "--parts", "tls", *files, str(authority.ca), "--json", "-"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    figures = {figure["name"]: figure["value"] for figure in orjson.loads(result.stdout)["results"]}
    for load in bench_tls.LOADS:
        for case in cases:
            assert figures[f"{load}, {case.name}"] > 0
            assert (f"{load}, {case.name} / plain" in figures) is (case is not bench_tls.PLAIN)


def test_tls_needs_certificates() -> None:
    result = CliRunner().invoke(app, ["--parts", "tls"], env={"BATON_TLS_CERT": ""})
    assert isinstance(result.exception, ConfigError)


def test_one_part_alone_to_standard_output() -> None:
    result = CliRunner().invoke(app, [*SMALL, "--parts", "ring", "--json", "-"])
    assert result.exit_code == 0, result.output
    assert {figure["part"] for figure in orjson.loads(result.stdout)["results"]} == {"ring"}


def test_an_unknown_part_is_refused() -> None:
    result = CliRunner().invoke(app, ["--parts", "map,engine"])
    assert result.exit_code == 2
    assert "engine" in result.output


async def test_an_answer_that_lacks_tokens_is_no_figure() -> None:
    async with fake_server(script=lambda task: Script((*TOKEN_TEXT, 65))) as cluster:
        rig = Rig(cluster.http, os.getpid(), Pace(), model="tiny")
        with pytest.raises(InternalError, match="1 tokens of 2"):
            await rig.ask(tokens=2, stream=True)
        assert (await rig.ask(tokens=1, stream=False)).is_ok
        for connection in rig.idle:
            connection.close()
