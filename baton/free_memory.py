"""How much memory this process can get: the machine's, within its control groups (v2 or v1)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from baton.cpus import CGROUP


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = CGROUP) -> int:
    """Memory that this process can get without anything being swapped out or killed: what the
    machine has, and what each of the process's control groups (v2 or v1) still allows."""
    lines = (proc / "meminfo").read_text().splitlines()
    machine = next(line for line in lines if line.startswith("MemAvailable"))
    return min(int(machine.split()[1]) * 1024, *_cgroups_left(proc, cgroup))


def _cgroups_left(proc: Path, root: Path) -> Iterator[int]:
    yield 1 << 62
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _levels_left(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _levels_left(root / "memory", path, *names)


def _levels_left(root: Path, path: str, limit: str, used: str, cache: str) -> Iterator[int]:
    """The group itself and all above it. Inside a container the path may name a place that only
    the host has; the container's own group is then the root."""
    level = root / path.strip("/")
    for group in (level, *level.parents):
        if group.is_relative_to(root):
            try:
                bound = (group / limit).read_text().strip()
                if bound != "max":
                    held = int((group / used).read_text()) - _statistic(group, cache)
                    yield max(0, int(bound) - held)
            except OSError:  # the root of all groups has no limit, and a hidden one no files
                continue


def _statistic(group: Path, name: str) -> int:
    """From memory.stat: `inactive_file` is page cache that goes when memory is asked for."""
    for line in (group / "memory.stat").read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
