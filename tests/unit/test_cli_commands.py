"""Command lines, plans and what commands print, without any cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

import baton
from baton.cli import generate, main
from baton.cli.bench import BenchServeOptions
from baton.cli.bench_handoff import BenchHandoffOptions, bench_handoff
from baton.cli.plan import make_plan
from baton.cli.report import Reporter
from baton.cli.serve_options import ServeOptions
from baton.cli.status import fleet_table, store_lines
from baton.cli.top_view import view
from baton.cli.trace import render
from baton.cli.waterfall import bar
from baton.client.http import Client, Prompt
from baton.errors import ConfigError, InternalError
from tests.unit.fake_cluster import EVENTS, sse

runner = CliRunner()
CLUSTER: dict[str, Any] = {
    "conductors": [
        {"name": "c0", "role": "conductor", "pid": 1, "address": "127.0.0.1:1", "state": "live"}
    ],
    "workers": [
        {
            "name": "decode-0",
            "role": "decode",
            "pid": 2,
            "address": "127.0.0.1:2",
            "state": "suspect",
            "cpus": "4-7",
            "running": 3,
            "waiting": 0,
            "blocks": {"free": 5, "active": 3, "cached": 2, "leased": 0, "quarantined": 0},
        }
    ],
    "stores": [],
}


def text_of(renderable: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(renderable)
        return console.export_text()


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "baton", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"baton {baton.__version__}\n"


def test_help_lists_every_command() -> None:
    result = runner.invoke(main.app, ["--help"])
    assert result.exit_code == 0
    commands = ("serve", "generate", "chat", "status", "top", "trace", "doctor", "bench", "sim")
    assert all(command in result.output for command in commands)


@pytest.mark.parametrize(
    "command", ["serve", "generate", "chat", "status", "top", "trace", "doctor"]
)
def test_every_command_explains_itself(command: str) -> None:
    result = runner.invoke(main.app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("given", "started"),
    [
        (
            ["--trace", "f", "--cluster", "1P+1D"],
            ["sim.fleet", "--trace", "f", "--cluster", "1P+1D"],
        ),
        (["compare", "a", "b", "--json"], ["sim.report", "compare", "a", "b", "--json"]),
        (["report", "a", "-o", "b"], ["sim.report", "a", "-o", "b"]),
        (["workload", "stats", "f"], ["sim.workload", "stats", "f"]),
        ([], ["sim.fleet", "--help"]),
        (["--help"], ["sim.fleet", "--help"]),
    ],
)
def test_sim_starts_the_simulator(
    given: list[str], started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", run)
    assert runner.invoke(main.app, ["sim", *given]).exit_code == 3
    assert seen == [[sys.executable, "-m", *started]]


def test_plan_starts_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert runner.invoke(main.app, ["plan", "--trace", "f"]).exit_code == 0
    assert seen == [[sys.executable, "-m", "sim.sizing", "--trace", "f"]]


def test_version() -> None:
    assert runner.invoke(main.app, ["--version"]).output == f"baton {baton.__version__}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["serve", "--prefill", "-1"],
        ["serve", "--decode", "0"],
        ["serve", "--port", "70000"],
        ["serve", "--no-such-flag"],
        ["generate"],
        ["bench", "serve", "--rate", "0"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_refused(argv: list[str]) -> None:
    assert runner.invoke(main.app, argv).exit_code == 2


def test_an_expected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConfigError("say what to do")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as exit_info:
        main.main()
    assert exit_info.value.code == "baton: say what to do"


def test_reporter_prints_objects_or_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter(as_json=True, verbose=False) as reporter:
        reporter.step("decode-0", "loading", pid=4)
        reporter.result("ready", "ready now", http="h")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == {"event": "progress", "name": "decode-0", "text": "loading", "pid": 4}
    assert lines[1] == {"event": "ready", "http": "h"}
    with Reporter(as_json=False, verbose=False) as reporter:
        reporter.step("decode-0", "live", done=True)
        reporter.result("ready", "ready now", http="h")
        reporter.log("decode-0", "INFO all is well")
        reporter.log("decode-0", "WARNING [not] well")
    captured = capsys.readouterr()
    assert captured.out == "ready now\n"
    assert captured.err == "decode-0: live\ndecode-0 | WARNING [not] well\n"


def test_a_reporter_outlives_its_reader() -> None:
    program = (
        "from baton.cli.report import Reporter\n"
        "reporter = Reporter(as_json=True, verbose=False)\n"
        "while input() == 'more': reporter.event('e', 'text')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("more\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"event": "e"}
        process.stdout.close()
        _, said = process.communicate("more\nmore\nend\n", timeout=30)
    assert (process.returncode, said) == (0, "")


def fake_client(body: bytes) -> Client:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "fake"}]})
        return httpx.Response(200, content=body)

    return Client("http://cluster", transport=httpx.MockTransport(handle))


async def test_an_answer_is_streamed_after_its_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    async with fake_client(sse(EVENTS)) as client:
        answer = await generate.print_answer(client, Prompt("> "), timing=True, echo=True)
    assert answer.finish_reason == "length"
    captured = capsys.readouterr()
    assert captured.out == "> hello world\n"
    assert "2 tokens from 3 (1 cached)" in captured.err


async def test_an_answer_without_an_end_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    async with fake_client(sse(EVENTS[:1])) as client:
        with pytest.raises(InternalError, match="finish reason"):
            await generate.print_answer(client, Prompt("x"), timing=False)
    assert capsys.readouterr().out == "hello\n"


def test_status_table_has_every_member() -> None:
    lines = text_of(fleet_table(CLUSTER)).splitlines()
    assert lines[0].split()[:5] == ["name", "role", "pid", "address", "state"]
    assert lines[1].split() == ["c0", "conductor", "1", "127.0.0.1:1", "live"]
    assert lines[2].split() == [
        *("decode-0", "decode", "2", "127.0.0.1:2", "suspect", "3", "0", "3", "2", "10")
    ]
    assert lines[3].strip() == "CPUs: decode-0 4-7"


def test_status_says_how_full_a_store_is_and_which_tier_is_off() -> None:
    cpu = {"tier": "cpu", "state": "on", "blocks": 3, "bytes": 3 << 20, "capacity_bytes": 8 << 20}
    disk = {**cpu, "tier": "nvme", "state": "off", "blocks": 0, "bytes": 0, "why": "disk on fire"}
    store = {"name": "store-a", "store": {"tiers": [cpu, disk], "pinned": 2}}
    assert [line.plain for line in store_lines({"stores": [store, {"name": "store-b"}]})] == [
        "store-a: cpu 3 blocks, 3.0 of 8.0 MiB; 2 blocks pinned",
        "store-a: nvme 0 blocks, 0.0 of 8.0 MiB; disk tier off: disk on fire",
    ]


@pytest.mark.parametrize("show", [fleet_table, lambda cluster: view("http://x", cluster, 80, None)])
def test_tables_lose_nothing_on_a_terminal_of_80_columns(show: Any) -> None:
    worker = {
        "name": "prefill-10",
        "role": "prefill",
        "pid": 4194303,
        "address": "127.0.0.1:65535",
        "state": "draining",
        "running": 256,
        "waiting": 1024,
        "blocks": {"free": 10_000, "active": 20_000, "cached": 30_000, "leased": 40_000},
    }
    text = text_of(show({"workers": [worker]}), width=80)
    assert "…" not in text
    row = next(line for line in text.splitlines() if "4194303" in line)
    assert row.split() == [
        *("prefill-10", "4194303", "127.0.0.1:65535", "draining"),
        *("256", "1024", "60000", "30000", "100000"),
    ]


def test_trace_bars_cover_the_request() -> None:
    timeline = {
        "request_id": "r1",
        "model": "demo",
        "outcome": "stop",
        "received_s": 10.0,
        "prompt_tokens": 5,
        "output_tokens": 2,
        "attempts": [
            {
                "attempt": "r1#0",
                "prefill": "p0",
                "decode": "d0",
                "reasons": ["least loaded"],
                "candidates": [
                    {
                        "worker": "p1",
                        "why": "holder",
                        "queue_s": 0.5,
                        "fetch_s": 0.01,
                        "prefill_s": 0.02,
                        "ttft_s": 0.53,
                        "cached_tokens": 64,
                        "fetch_tokens": 32,
                    }
                ],
            }
        ],
        "spans": [
            {"source": "p0", "attempt": "r1#0", "name": "prefill", "start_s": 10.0, "end_s": 10.5},
            {"source": "d0", "attempt": "r1#0", "name": "decode", "start_s": 10.5, "end_s": 11.0},
        ],
    }
    narrow = text_of(render(timeline, width=80), width=80)
    assert "…" not in narrow
    assert narrow.count("█") > 20
    text = text_of(render(timeline))
    assert "p0 → d0  (least loaded)" in text
    assert "p1 (holder): queue 500.0 ms + fetch 32 tokens 10.0 ms + prefill 20.0 ms" in text
    assert "= 530.0 ms, 64 tokens cached" in text
    prefill, decode = [line for line in text.splitlines() if "█" in line]
    assert prefill.rstrip().endswith("500.0")
    assert prefill.index("█") < decode.index("█")
    assert text_of(render({"request_id": "r2"})).startswith("r2")


def first_token(**told: Any) -> dict[str, Any]:
    stages = [("tokenize", 10.0, 10.1), ("prefix_load", 10.1, 10.4), ("prefill", 10.4, 10.95)]
    return {
        "request_id": "r1",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "outcome": "ok",
        "received_s": 10.0,
        "ended_s": 12.0,
        "output_tokens": 11,
        "ttft_s": 1.0,
        "ttft_attributed": 0.95,
        "ttft_stages": [
            {"name": name, "start_s": start, "end_s": end, "seconds": end - start}
            for name, start, end in stages
        ],
        "second_token_stages": [{"name": "exposed_transfer", "seconds": 0.02}],
        "attempts": [
            {"attempt": "r1.0#0", "sent_s": 10.1, "first_token_s": 11.0, "ended_s": 11.5},
            {"attempt": "r1.0#1", "sent_s": 11.5, "ended": "worker_lost: gone"},
        ],
    } | told


@pytest.mark.parametrize("width", [60, 80, 120])
def test_trace_attributes_every_millisecond_of_the_ttft(width: int) -> None:
    text = text_of(render(first_token(), width=width), width=width)
    assert "…" not in text
    assert "TTFT 1000.0 ms, 95.0% attributed" in text
    table = text.split("attributed\n")[1].split("then")[0].replace("█", "").splitlines()[1:]
    assert [row.split("  ")[1] for row in table] == [
        *("tokenize", "prefix load", "prefill", "unattributed")
    ]
    assert sum(float(row.split()[-2]) for row in table) == pytest.approx(1000.0)
    assert sum(float(row.split()[-1].rstrip("%")) for row in table) == pytest.approx(100.0)
    words = " ".join(text.split())
    assert "until the second token: exposed transfer 20.0 ms" in words
    assert "then 10 tokens in 1000.0 ms: TPOT 100.0 ms" in words
    assert "sent at 100.0 ms, first token at 1000.0 ms, ended at 1500.0 ms" in words
    assert "ended: worker_lost: gone" in words


def test_trace_of_a_request_without_a_token() -> None:
    missing = {"ttft_s": None, "ttft_attributed": None}
    failed = text_of(render(first_token(**missing, outcome="no_worker", error="nobody is there")))
    assert "no token came; 950.0 ms are known" in failed
    assert "nobody is there" in failed
    running = text_of(render(first_token(**missing, outcome="running", ended_s=None)))
    assert "no token yet; 950.0 ms are known" in running


@pytest.mark.parametrize(
    ("begin", "length", "want"),
    [(0, 1, "████"), (0.5, 0.25, "  █ "), (1, 0, "   █"), (0, 0, "█   ")],
)
def test_bar(begin: float, length: float, want: str) -> None:
    assert bar(begin, length, width=4) == want


def test_bench_compares_with_as_many_colocated_workers() -> None:
    split, colocated = BenchServeOptions(prefill=2, decode=1, compare=True).clusters().values()
    assert (split.prefill_workers, split.decode) == (2, 1)
    assert (colocated.prefill_workers, colocated.decode) == (0, 3)
    assert list(BenchServeOptions(colocated=True).clusters()) == ["2 co-located"]
    assert list(BenchServeOptions().clusters()) == ["1P1D"]
    assert BenchServeOptions(slo_ttft=250.0).plan().slo.ttft_s == 0.25


def test_bench_compares_policies_with_and_without_fetching() -> None:
    clusters = BenchServeOptions(prefill=2, policies="random,random+local,cache-aware").clusters()
    assert {name: (c.policy, c.kv_fetch, c.prefill) for name, c in clusters.items()} == {
        "random": ("random", True, 2),
        "random+local": ("random", False, 2),
        "cache-aware": ("cache-aware", True, 2),
    }


def test_fetching_kv_can_be_turned_off() -> None:
    def conductor(**options: Any) -> tuple[str, ...]:
        return make_plan(ServeOptions(**options), Path("m"), {}).conductor(None).argv

    assert "--no-kv-fetch" in conductor(kv_fetch=False)
    assert "--no-kv-fetch" not in conductor()


def test_bench_handoff_takes_whole_numbers() -> None:
    for flag in ("block_kib", "input_tokens"):
        options = BenchHandoffOptions(**{flag: "64,big"})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="--" + flag.replace("_", "-")):
            bench_handoff(options)


def test_bench_handoff_knows_its_transports() -> None:
    with pytest.raises(ConfigError, match="nixl, nccl, shm by commas, not 'tcp'"):
        bench_handoff(BenchHandoffOptions(transport="shm, tcp"))


@pytest.mark.parametrize(("part", "said"), [("store", "block-kib"), ("router", "prompt-tokens")])
def test_benches_of_processes_pass_everything_on(part: str, said: str) -> None:
    command = [sys.executable, "-m", "baton.cli.main", "bench", part]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert said in helped.stdout
    wrong = subprocess.run([*command, "--no-such-flag"], capture_output=True, check=False)
    assert wrong.returncode == 2
