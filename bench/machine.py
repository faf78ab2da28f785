"""What the figures were measured on, and the lock that keeps measurements apart."""

from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import shlex
import subprocess
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from baton.cpus import available_cpus

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


_FILES = ("--json", "--lock", "--logs", "--page", "--save", "--calibration")


def origin(benchmark: str, argv: Sequence[str]) -> dict[str, Any]:
    """The head of a result: what ran `python -m bench.BENCHMARK`, on what, and when. Where files
    were says nothing about the result, and is left out."""
    files = {place for n, text in enumerate(argv) if text in _FILES for place in (n, n + 1)}
    kept = [text for n, text in enumerate(argv) if n not in files]
    return {
        "benchmark": benchmark,
        "command": shlex.join(["python", "-m", f"bench.{benchmark}", *kept]),
        "revision": revision(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe(available_cpus()),
    }


def describe(cpus: Sequence[int]) -> dict[str, Any]:
    """The processor, what of it is used, memory, kernel; and GPUs if there are any."""
    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    return {
        "processor": info.get("model name", platform.processor()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cpus": list(cpus),
        "cpus_of_machine": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1min": os.getloadavg()[0],
        "gpus": _gpus(),
    }


def revision() -> str:
    """The commit that is checked out, with `+` when files differ from it; `unknown` without git."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


@asynccontextmanager
async def exclusively(lock: Path | None) -> AsyncGenerator[None, None]:
    """Hold the lock file, as flock(1) does, so that those who measure here take turns."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        await _lock(file)
        yield


async def _lock(file: IO[str]) -> None:
    """Wait for the lock in a thread that does not keep this process from ending meanwhile."""
    loop = asyncio.get_running_loop()
    locked: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not locked.done():
            locked.set_result(None)

    def wait() -> None:
        with suppress(OSError, RuntimeError):  # closed file or loop: nobody waits any more
            fcntl.flock(file, fcntl.LOCK_EX)
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=wait, name="lock", daemon=True).start()
    await locked


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if line)
    info: dict[str, str] = {}
    for name, _, value in pairs:
        info.setdefault(name.strip(), value.strip())
    return info


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return answer.stdout.strip().splitlines()
