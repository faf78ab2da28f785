"""Checks of memory, and of the limits on it."""

from __future__ import annotations

import resource

from baton.cli.doctor.finding import Finding, ok, warn
from baton.cli.doctor.machine import Machine
from baton.cli.doctor.wanted import Wanted

_GIB = 1 << 30
_MEMORY_WANTED = 2 * _GIB  # the demo model on two workers, and torch in each of them
_SHM_WANTED = 256 << 20  # the KV pools of two small workers
_FILES_WANTED = 4096  # a conductor needs one for each client that waits
_IPC_LOCK = 1 << 14  # CAP_IPC_LOCK: no limit on locked memory


def memory(machine: Machine, wanted: Wanted) -> Finding:
    free, total = machine.available_memory(), _total(machine)
    bound = ", by a limit of the container" if free < _said(machine, "MemAvailable") else ""
    text = f"{free / _GIB:.1f} GiB free of {total / _GIB:.1f}{bound}"
    if free < _MEMORY_WANTED:
        return warn(text, "enough for little: free some, or raise the container's limit")
    return ok(text)


def _total(machine: Machine) -> int:
    return _said(machine, "MemTotal")


def _said(machine: Machine, key: str) -> int:
    """Bytes; 0 when it is not said."""
    for line in (machine.read("/proc/meminfo") or "").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def shared_memory(machine: Machine, wanted: Wanted) -> Finding:
    free = machine.free("/dev/shm")
    if free is None:
        return warn(
            "no /dev/shm", "--transport shm and KV stores will not work; mount a tmpfs there"
        )
    text = f"/dev/shm has {free / 2**20:.0f} MiB free"
    if free < _SHM_WANTED:
        return warn(text, "in a container: --shm-size=1g; in Kubernetes: shmSize of the pool")
    return ok(text)


def locked_memory(machine: Machine, wanted: Wanted) -> Finding:
    """What RDMA registers is locked."""
    limit = machine.limit(resource.RLIMIT_MEMLOCK)
    if limit is None:
        return ok("no limit")
    if _capabilities(machine) & _IPC_LOCK:
        return ok(f"no limit with IPC_LOCK, which this process has ({limit / 2**20:g} MiB else)")
    text = f"limit of {limit / 2**20:g} MiB"
    if not machine.names("/sys/class/infiniband"):
        return ok(f"{text} (matters with RDMA only)")
    return warn(
        text,
        "RDMA cannot register KV pools: ulimit -l unlimited, or LimitMEMLOCK=infinity in the "
        "systemd unit (of the container runtime)",
    )


def _capabilities(machine: Machine) -> int:
    for line in (machine.read("/proc/self/status") or "").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def open_files(machine: Machine, wanted: Wanted) -> Finding:
    limit = machine.limit(resource.RLIMIT_NOFILE)
    if limit is not None and limit < _FILES_WANTED:
        return warn(
            f"limit of {limit}",
            "a conductor needs one for each client: ulimit -n 65536, or LimitNOFILE in systemd",
        )
    return ok("no limit" if limit is None else f"limit of {limit}")
