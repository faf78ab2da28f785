"""The device that is measured: its name, waiting for it, and timing of single operations."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.bench.engine_time import Timing, measure, summarize
from baton.cpus import choose_placement
from baton.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """`name` is "cpu" or "cuda:N". On a CPU, `threads` compute, pinned to the first of `cpus`."""

    name: str
    threads: int
    cpus: tuple[int, ...]

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")

    def sync(self) -> None:
        """Return when everything that was queued has been computed."""
        if self.is_cuda:
            torch.cuda.synchronize(self.name)

    def time(self, operation: Callable[[], object], budget_s: float) -> Timing:
        """One operation by itself. On CUDA by events, with a cold L2 cache and without the time
        that launching takes, which overlaps when there is more to do."""
        if not self.is_cuda:
            return measure(operation, budget_s)
        from triton.testing import do_bench  # the package is an extra

        milliseconds = do_bench(operation, rep=round(budget_s * 1e3), return_mode="all")
        return summarize([value / 1e3 for value in milliseconds])

    def describe(self) -> str:
        if self.is_cuda:
            return torch.cuda.get_device_name(self.name)
        return f"{_cpu_name()}, {self.threads} of {len(self.cpus)} CPUs"

    def free_bytes(self) -> int:
        if self.is_cuda:
            return torch.cuda.mem_get_info(self.name)[0]
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
        raise ConfigError("this machine does not say how much memory is available")


def find_device(name: str, threads: int) -> Device:
    """`name` is auto, cpu, cuda or cuda:N; `threads` 0 = one per CPU.

    Sets torch's threads. Raises ConfigError when there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = "cuda:0"
    if name != "cpu" and not name.startswith("cuda:"):
        raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"there is no {name} here: torch sees no CUDA GPU")
    placement = choose_placement("", threads)
    torch.set_num_threads(placement.threads)
    return Device(name, placement.threads, placement.cpus)


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
