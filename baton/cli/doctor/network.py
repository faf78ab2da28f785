"""Checks of what moves KV, and of ports."""

from __future__ import annotations

from dataclasses import dataclass

from baton.cli.doctor.finding import Finding, fail, ok, warn
from baton.cli.doctor.machine import Machine
from baton.cli.doctor.wanted import Wanted

_SYSFS = "/sys/class/infiniband"


@dataclass(frozen=True, slots=True)
class _Port:
    name: str
    state: str  # ACTIVE, DOWN, INIT, ...
    rate: str
    layer: str  # InfiniBand or Ethernet (RoCE)

    @property
    def up(self) -> bool:
        return self.state == "ACTIVE"

    def __str__(self) -> str:
        return f"{self.name} {self.rate} {self.layer}" if self.up else f"{self.name} {self.state}"


def rdma(machine: Machine, wanted: Wanted) -> Finding:
    ports = _ports(machine)
    if not ports:
        return warn("no device", "between machines KV goes over TCP")
    text = ", ".join(map(str, ports))
    if not any(port.up for port in ports):
        return warn(text, "no port is active: look at cables and the switch, or `ip link`")
    if not machine.names("/dev/infiniband"):
        return warn(
            text,
            "/dev/infiniband is not here: give the container the device (--device "
            "/dev/infiniband; in Kubernetes a resource of the RDMA device plugin)",
        )
    if down := [port.name for port in ports if not port.up]:
        return warn(text, f"not in use: {', '.join(down)}")
    return ok(text)


def gpu_direct(machine: Machine, wanted: Wanted) -> Finding | None:
    """Whether adapters can reach GPUs' memory; None: it takes both."""
    found = machine.probe("torch")
    if isinstance(found, str) or not found["gpus"] or not _ports(machine):
        return None
    loaded = {line.split(" ")[0] for line in (machine.read("/proc/modules") or "").splitlines()}
    if loaded & {"nvidia_peermem", "nv_peer_mem"}:
        return ok("nvidia_peermem is loaded")
    return warn(
        "nvidia_peermem is not loaded",
        "modprobe nvidia_peermem, unless kernel and UCX share GPU memory by DMA-BUF; without "
        "both, KV is copied through the CPU's memory",
    )


def _ports(machine: Machine) -> list[_Port]:
    return [
        _port(machine, device, number)
        for device in machine.names(_SYSFS)
        for number in machine.names(f"{_SYSFS}/{device}/ports")
    ]


def _port(machine: Machine, device: str, number: str) -> _Port:
    def said(what: str) -> str:
        return (machine.read(f"{_SYSFS}/{device}/ports/{number}/{what}") or "").strip()

    name = device if machine.names(f"{_SYSFS}/{device}/ports") == ["1"] else f"{device}:{number}"
    state = said("state").rpartition(":")[2].strip() or "unknown"
    speed = " ".join(said("rate").split()[:2])  # "400 Gb/sec (4X NDR)"
    return _Port(name, state, speed, said("link_layer"))


def nixl(machine: Machine, wanted: Wanted) -> Finding:
    """A real transfer: this is what KV takes by default where it can be loaded."""
    found = machine.probe("transports")
    if isinstance(found, str):
        return warn(f"unknown: {found}")
    if "nixl" in found["missing"]:
        return warn(found["missing"]["nixl"], "until it works, shm is used, on one machine")
    moved = machine.probe("transfer", "nixl")
    if isinstance(moved, str):
        return fail(
            f"UCX moved nothing between two processes: {moved}",
            "see UCX_LOG_LEVEL=info, try UCX_TLS=tcp; or use --transport shm on one machine",
        )
    plugins = ", ".join(found["plugins"])
    return ok(f"UCX reads {_rate(moved['bytes_per_s'])} from another process; plugins: {plugins}")


def transports(machine: Machine, wanted: Wanted) -> Finding:
    found = machine.probe("transports")
    if isinstance(found, str):
        return fail(found)
    why = "; ".join(f"{name} ({reason})" for name, reason in found["missing"].items())
    missing = f"not usable: {why}" if why else ""
    if not found["usable"]:
        return fail("none is usable: KV cannot be handed over", missing)
    return ok(", ".join(_with_rate(machine, name) for name in found["usable"]), missing)


def _with_rate(machine: Machine, name: str) -> str:
    """nccl is not timed: it takes torch in two processes."""
    moved = "" if name == "nccl" else machine.probe("transfer", name)
    return name if isinstance(moved, str) else f"{name} {_rate(moved['bytes_per_s'])}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def ports(machine: Machine, wanted: Wanted) -> Finding:
    taken = [str(port) for port in wanted.ports if not machine.port_is_free(port)]
    if taken:
        return warn(
            f"in use: {', '.join(taken)}",
            "choose others: baton serve --port N --grpc-port N (0 = any)",
        )
    return ok(f"{' and '.join(map(str, wanted.ports))} are free")
