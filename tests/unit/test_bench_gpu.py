"""`python -m baton.bench.gpu`: parts with deadlines, and a machine that has little installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from baton.bench import gpu, gpu_parts

ROOT = Path(__file__).resolve().parents[2]

# What such a machine may lack: our dependencies that neither torch nor transformers brings.
MISSING = (
    *(
        "anyio",
        "fastapi",
        "grpc_health",
        "grpc_reflection",
        "hypothesis",
        "jinja2",
        "nixl",
        "openai",
    ),
    *(
        "orjson",
        "prometheus_client",
        "pydantic",
        "pytest_asyncio",
        "pytest_timeout",
        "ray",
        "redis",
    ),
    *("rich", "starlette", "typer", "uvicorn", "xxhash"),
)

BLOCKER = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def without(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in {missing!r} else find(name, path, target)
PathFinder.find_spec = classmethod(without)
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a process, and of those that it starts, without those packages."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(BLOCKER.format(missing=set(MISSING)))
    environ = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return environ


def run(environ: dict[str, str], out: Path, *flags: str) -> tuple[int, dict[str, object], str]:
    command = [sys.executable, "-m", "baton.bench.gpu", "--out", str(out), *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert (out / "gpu.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((out / "gpu.json").read_text()), done.stdout


@pytest.mark.timeout(400)
def test_every_part_runs_on_a_bare_machine(bare: dict[str, str], tmp_path: Path) -> None:
    """On the CPU, with tiny sizes: the same code. Peers are left out; they have their own needs."""
    names = ["machine", "tests", "weights", "attention", "decode", "prefill", "kernels", "steps"]
    flags = ("--device", "cpu", "--quick", "--parts", ",".join(names))
    code, report, printed = run(bare, tmp_path / "out", *flags)
    parts = report["parts"]
    assert isinstance(parts, dict)
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(names, "ok"), (
        printed
    )
    assert code == 0
    assert parts["tests"]["failures"] == 0
    assert parts["decode"]["report"]["decode"][0]["name"] == "decode 1 x 64"
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text in printed
    for title in ("# machine: ok", "## Prefill attention", "## Decode", "## Kernels"):
        assert title in text


def test_a_failing_part_hides_no_other(bare: dict[str, str], tmp_path: Path) -> None:
    """Without the part that writes weights, what needs them fails, and says how."""
    flags = ("--device", "cpu", "--quick", "--parts", "decode,machine")
    code, report, printed = run(bare, tmp_path / "out", *flags)
    parts = report["parts"]
    assert isinstance(parts, dict)
    assert code == 1
    assert parts["machine"]["status"] == "ok"
    assert parts["decode"]["status"] == "failed"
    assert "ModelLoadError" in "\n".join(parts["decode"]["output"])
    assert "# decode: failed" in printed


def test_no_part_begins_when_the_time_is_over(bare: dict[str, str], tmp_path: Path) -> None:
    flags = ("--quick", "--parts", "machine", "--limit", "0")
    code, report, _ = run(bare, tmp_path / "out", *flags)
    assert code == 1
    assert report["parts"]["machine"]["status"] == "no time left"  # type: ignore[index]


def test_a_part_is_ended_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything that it started."""
    pipe, end = os.pipe()  # open in every process of the part, and closed when the last one ends
    child = "import signal; signal.pause()"
    script = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {child!r}], stdout={end}, pass_fds=[{end}])"
    )
    monkeypatch.setattr(gpu, "command_of", lambda *_: [sys.executable, "-c", script])
    monkeypatch.setattr(subprocess, "Popen", partial(subprocess.Popen, pass_fds=[end]))
    options = gpu.parse(["--quick"])
    outcome = gpu.run_part(gpu.Part("machine", 0.5), tmp_path, options, left_s=60.0)
    os.close(end)
    assert outcome.status == "timed out"
    with os.fdopen(pipe, "rb") as rest:
        rest.read()  # returns when nobody is left


def test_failures_of_the_tests_are_named() -> None:
    xml = """<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1">
      <testcase name="good"/><testcase name="off"><skipped message="no GPU"/></testcase>
      <testcase name="bad"><failure message="1 is not 2">trace</failure></testcase>
    </testsuite></testsuites>"""
    found = gpu_parts.summarize_tests(xml)
    assert (found["tests"], found["failures"], found["skipped"]) == (3, 1, 1)
    assert found["failed"] == [{"name": "bad", "message": "1 is not 2"}]
    assert "- bad: 1 is not 2" in found["markdown"]


def test_parts_have_functions_and_fit_into_ten_minutes() -> None:
    assert {part.name for part in gpu.PARTS} == set(gpu_parts.PARTS)
    assert gpu.LIMIT_S < 600
