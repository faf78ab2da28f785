"""Checks of what computes: Python, CPUs, torch, GPUs."""

from __future__ import annotations

import re
import sys
from typing import Any

from baton.cli.doctor.finding import Finding, fail, ok, warn
from baton.cli.doctor.machine import Machine
from baton.cli.doctor.topology import parse
from baton.cli.doctor.wanted import Wanted
from baton.cpus import available_cpus, cpu_quota, format_cpus

_BFLOAT16 = 8  # the first compute capability that has it


def python(machine: Machine, wanted: Wanted) -> Finding:
    return ok(".".join(map(str, sys.version_info[:3])))


def cpus(machine: Machine, wanted: Wanted) -> Finding:
    found, quota = available_cpus(), cpu_quota()
    bound = "" if quota is None else f", time of {quota:g} (the container's quota)"
    return ok(f"{len(found)}: {format_cpus(found)}{bound}")


def native(machine: Machine, wanted: Wanted) -> Finding:
    from baton.native import unavailable, variant

    used = variant()
    if used is not None:
        return ok(f"{used.title}, C++ (bfloat16 models; others compute through torch)")
    return warn(f"not used: {unavailable()}", "models compute through torch, which takes longer")


def torch(machine: Machine, wanted: Wanted) -> Finding:
    found = machine.probe("torch")
    if isinstance(found, str):
        return fail(f"does not work: {found}", "pip install torch")
    return ok(f"{found['version']}{', Triton' if found['triton'] else ''}")


def gpu(machine: Machine, wanted: Wanted) -> Finding:
    found = machine.probe("torch")
    if isinstance(found, str):
        return warn("unknown: torch cannot be imported")
    if not found["gpus"]:
        return warn("no CUDA device", "workers use the CPU")
    old = [device["name"] for device in found["gpus"] if device["capability"][0] < _BFLOAT16]
    advice = f"{', '.join(old)}: no bfloat16, use --dtype float32" if old else ""
    return (warn if old else ok)("; ".join(map(_describe, found["gpus"])), advice)


def _describe(device: dict[str, Any]) -> str:
    return f"{device['name']}, {device['bytes'] / 2**30:.0f} GiB"


def driver(machine: Machine, wanted: Wanted) -> Finding | None:
    """NVIDIA's driver next to the CUDA that torch was built for; None: neither is there."""
    found = machine.probe("torch")
    version = _driver_version(machine)
    if isinstance(found, str) or (version is None and found["cuda"] is None):
        return None
    built, known = found["cuda"], found["driver_cuda"]
    if built is None:
        return warn(
            f"{version}, but this torch is a CPU build",
            "install a torch for CUDA (pytorch.org says how); until then workers use the CPU",
        )
    if version is None or known is None:
        return warn(
            f"none that can be used; torch was built for CUDA {built}",
            "install NVIDIA's driver; in a container: --gpus all, with NVIDIA's Container Toolkit",
        )
    if _major(known) < _major(built):
        return warn(
            f"{version} knows CUDA up to {known}; torch was built for {built}",
            f"install a newer driver, or a torch for CUDA {_major(known)}",
        )
    return ok(f"{version} (CUDA up to {known}; torch was built for {built})")


def _driver_version(machine: Machine) -> str | None:
    said = machine.read("/proc/driver/nvidia/version") or ""
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", said)
    return match[1] if match else None


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def gpu_topology(machine: Machine, wanted: Wanted) -> Finding | None:
    """None: there is nothing to connect."""
    found = parse(machine.run("nvidia-smi", "topo", "-m") or "")
    if found is None or (len(found.gpus) < 2 and not found.adapters):
        return None
    pairs = ", ".join(f"{link} {count}" for link, count in sorted(found.pairs.items()))
    detail = f"{len(found.gpus)} GPUs" + (f", pairs by link: {pairs}" if pairs else "")
    if far := found.far_from_adapters:
        return warn(
            f"{detail}; {', '.join(far)} far from every network adapter",
            "their KV crosses the CPU on its way to other machines: run prefill and decode that "
            "exchange it on GPUs next to an adapter (PIX, PXB, PHB)",
        )
    if found.pairs["SYS"]:
        return warn(
            detail,
            "SYS: KV between these GPUs crosses sockets; prefer pairs on one (nvidia-smi topo -m)",
        )
    return ok(detail)
