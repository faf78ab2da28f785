"""`baton doctor`: what this machine can do, and what to do about what it cannot."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.cli.options import Json
from baton.cpus import available_cpus, cpu_quota, format_cpus
from baton.errors import ModelLoadError

_PROBE_TIMEOUT_S = 120.0
_SHM_WANTED = 256 << 20  # bytes: the KV pools of two small workers


class Verdict(StrEnum):
    OK = "ok"
    WARN = "warn"  # something optional is missing
    FAIL = "fail"  # baton cannot serve here


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    detail: str
    advice: str = ""


def doctor(as_json: Json = False) -> None:
    """Check this machine: Python, CPUs, torch, GPUs, RDMA, NIXL, shared memory, Redis, ports."""
    checks = []
    console = Console(stderr=True)
    with console.status("checking") as status:
        for name, check in _CHECKS.items():
            status.update(f"checking {name}")
            checks.append(Check(name, *check()))
    if as_json:
        result = {"ok": not _failed(checks), "checks": [asdict(check) for check in checks]}
        sys.stdout.write(orjson.dumps(result).decode() + "\n")
    else:
        Console().print(_table(checks))
    if _failed(checks):
        raise typer.Exit(1)


def _failed(checks: list[Check]) -> bool:
    return any(check.verdict is Verdict.FAIL for check in checks)


def _table(checks: list[Check]) -> Table:
    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        text = Text(check.detail)
        if check.advice:
            text.append(f"\n→ {check.advice}", style="dim")
        table.add_row(Text(check.verdict, style=colours[check.verdict]), check.name, text)
    return table


Finding = tuple[Verdict, str] | tuple[Verdict, str, str]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Verdict.OK, version


def _cpus() -> Finding:
    cpus, quota = available_cpus(), cpu_quota()
    bound = "" if quota is None else f", time of {quota:g} (the container's quota)"
    return Verdict.OK, f"{len(cpus)}: {format_cpus(cpus)}{bound}"


def _native() -> Finding:
    from baton.native import unavailable, variant

    used = variant()
    if used is not None:
        return Verdict.OK, f"{used.title}, C++ (bfloat16 models; others compute through torch)"
    return Verdict.WARN, f"not used: {unavailable()}; models compute through torch"


def _torch() -> Finding:
    found = _probe("torch")
    if isinstance(found, str):
        return Verdict.FAIL, found, "pip install torch"
    return Verdict.OK, f"{found['version']}{', Triton' if found['triton'] else ''}"


def _gpu() -> Finding:
    found = _probe("torch")
    if isinstance(found, str):
        return Verdict.WARN, "unknown: torch cannot be imported"
    if found["gpus"]:
        return Verdict.OK, f"CUDA {found['cuda']}: {'; '.join(found['gpus'])}"
    advice = "" if found["cuda"] else "this torch is a CPU build; a GPU needs a CUDA build"
    return Verdict.WARN, "no CUDA device; workers use the CPU", advice


def _rdma() -> Finding:
    directory = Path("/sys/class/infiniband")
    devices = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if devices:
        return Verdict.OK, ", ".join(devices)
    return Verdict.WARN, "no device; between machines KV goes over TCP"


def _nixl() -> Finding:
    found = _probe("nixl")
    if isinstance(found, str):
        return Verdict.WARN, found, "pip install 'baton-llm[nixl]'; until then shm is used"
    return Verdict.OK, f"UCX works; plugins: {', '.join(found['plugins'])}"


def _transports() -> Finding:
    found = _probe("transports")
    if isinstance(found, str):
        return Verdict.FAIL, found
    missing = f"not usable: {'; '.join(found['missing'])}" if found["missing"] else ""
    if not found["usable"]:
        return Verdict.FAIL, "none is usable: KV cannot be handed over", missing
    return Verdict.OK, "; ".join(found["usable"]), missing


def _shared_memory() -> Finding:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        return Verdict.WARN, f"/dev/shm: {error.strerror}", "--transport shm will not work"
    text = f"/dev/shm has {free / 2**20:.0f} MiB free"
    if free < _SHM_WANTED:
        return Verdict.WARN, text, "in a container: --shm-size=1g"
    return Verdict.OK, text


def _redis() -> Finding:
    if importlib.util.find_spec("redis") is None:
        return Verdict.WARN, "no client", "only several conductors need it: baton-llm[redis]"
    parts = urlsplit(os.environ.get("BATON_REDIS_URL", "redis://127.0.0.1:6379"))
    host, port = parts.hostname or "127.0.0.1", parts.port or 6379
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return Verdict.OK, f"{host}:{port} answers"
    except OSError:
        return Verdict.WARN, f"nothing at {host}:{port}", "only several conductors need it"


def _ports() -> Finding:
    taken = [str(port) for port in (8000, 50051) if not _is_free(port)]
    if taken:
        advice = "choose others: baton serve --port N --grpc-port N (0 = any)"
        return Verdict.WARN, f"in use: {', '.join(taken)}", advice
    return Verdict.OK, "8000 and 50051 are free"


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _demo_model() -> Finding:
    from baton.demo import demo_model_path
    from baton.model.spec import load_spec

    try:
        spec = load_spec(demo_model_path())
    except ModelLoadError as error:
        return Verdict.FAIL, error.message, "install baton-llm again; its data is incomplete"
    return Verdict.OK, f"{spec.num_layers} layers, context of {spec.max_model_len} tokens"


_CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "CPUs": _cpus,
    "CPU operations": _native,
    "torch": _torch,
    "GPU": _gpu,
    "RDMA": _rdma,
    "NIXL": _nixl,
    "transports": _transports,
    "shared memory": _shared_memory,
    "Redis": _redis,
    "ports": _ports,
    "demo model": _demo_model,
}


@functools.cache
def _probe(library: str) -> dict[str, Any] | str:
    """What baton.cli.probe says, or one line that says why it could not. Asked once."""
    command = [sys.executable, "-m", "baton.cli.probe", library]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"importing {library} took more than {_PROBE_TIMEOUT_S:.0f} s"
    lines = list(_json_lines(done.stdout))
    if done.returncode == 0 and lines:
        return lines[-1]
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return f"{library} does not work: {last}"


def _json_lines(output: str) -> Iterator[dict[str, Any]]:
    for line in output.splitlines():
        if line.startswith("{"):
            yield orjson.loads(line)
