"""`baton doctor`: every check in turn, then a table or JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from baton.cli.doctor import compute, memory, network, services
from baton.cli.doctor.finding import Finding, Verdict
from baton.cli.doctor.machine import Machine, this_machine
from baton.cli.doctor.wanted import Wanted
from baton.cli.options import Json

Check = Callable[[Machine, Wanted], Finding | None]

CHECKS: Mapping[str, Check] = {
    "Python": compute.python,
    "CPUs": compute.cpus,
    "CPU operations": compute.native,
    "memory": memory.memory,
    "torch": compute.torch,
    "GPU": compute.gpu,
    "GPU driver": compute.driver,
    "GPU topology": compute.gpu_topology,
    "RDMA": network.rdma,
    "GPUDirect": network.gpu_direct,
    "NIXL": network.nixl,
    "transports": network.transports,
    "shared memory": memory.shared_memory,
    "locked memory": memory.locked_memory,
    "open files": memory.open_files,
    "disk": services.disk,
    "Redis": services.redis,
    "certificates": services.certificates,
    "ports": network.ports,
    "clock": services.clock,
    "demo model": services.demo_model,
}


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    finding: Finding


StoreDir = Annotated[
    str, typer.Option(metavar="DIR", help="Directory of a KV store's NVMe tier: time its disk.")
]
Redis = Annotated[
    str,
    typer.Option(
        envvar="BATON_REDIS",
        metavar="URL",
        help="Redis of several conductors; password and TLS by the variables of the processes.",
    ),
]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Of HTTP.")]
GrpcPort = Annotated[int, typer.Option(min=1, max=65535, help="Of gRPC.")]


def doctor(
    store_dir: StoreDir = "",
    redis: Redis = "",
    port: Port = 8000,
    grpc_port: GrpcPort = 50051,
    as_json: Json = False,
) -> None:
    """Check this machine, and say what to do: computing, KV transfers, memory, disk, Redis, clock.

    The exit code is 1 when baton cannot serve here, or cannot use what the options ask for."""
    certificates = bool({"BATON_TLS_CERT", "BATON_SSL_CERTFILE"} & os.environ.keys())
    wanted = Wanted(store_dir, bool(redis), (port, grpc_port), certificates)
    with Console(stderr=True).status("checking") as status:
        lines = list(examine(this_machine(redis), wanted, lambda n: status.update(f"checking {n}")))
    if as_json:
        sys.stdout.write(orjson.dumps(_as_json(lines)).decode() + "\n")
    else:
        Console().print(table(lines))
    if not _can_serve(lines):
        raise typer.Exit(1)


def examine(machine: Machine, wanted: Wanted, progress: Callable[[str], None]) -> Iterator[Line]:
    """Checks that have nothing to say here are left out."""
    for name, check in CHECKS.items():
        progress(name)
        finding = check(machine, wanted)
        if finding is not None:
            yield Line(name, finding)


def _can_serve(lines: list[Line]) -> bool:
    return all(line.finding.verdict is not Verdict.FAIL for line in lines)


def _as_json(lines: list[Line]) -> dict[str, object]:
    checks = [{"name": line.name, **asdict(line.finding)} for line in lines]
    return {"ok": _can_serve(lines), "checks": checks}


def table(lines: list[Line]) -> Table:
    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}
    drawn = Table(box=None, show_header=False, pad_edge=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    for line in lines:
        text = Text(line.finding.detail)
        if line.finding.advice:
            text.append(f"\n→ {line.finding.advice}", style="dim")
        verdict = line.finding.verdict
        drawn.add_row(Text(verdict, style=colours[verdict]), line.name, text)
    return drawn
