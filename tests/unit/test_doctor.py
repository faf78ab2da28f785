"""`baton doctor` on machines that are made up."""

from __future__ import annotations

import json
import resource
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from baton.cli import main
from baton.cli.doctor import command, compute, memory, network, services
from baton.cli.doctor.finding import Finding, Verdict, fail, ok, warn
from baton.cli.doctor.machine import Found, ThisMachine
from baton.cli.doctor.topology import parse
from baton.cli.doctor.wanted import Wanted
from tests.unit.doctor_kit import GIB, FakeMachine

H200 = {"name": "NVIDIA H200", "bytes": 141 * GIB, "capability": [9, 0]}
CPU_TORCH = {"version": "2.13.0", "cuda": None, "driver_cuda": None, "gpus": [], "triton": True}
GPU_TORCH = {**CPU_TORCH, "cuda": "12.8", "driver_cuda": "12.8", "gpus": [H200, H200]}
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan\nGCC version: 12\n"
OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
IB = "/sys/class/infiniband"
NOTHING = Wanted()


def with_torch(torch: Found, driver: str = "") -> FakeMachine:
    return FakeMachine({("torch",): torch}, {"/proc/driver/nvidia/version": driver})


def adapter(name: str, state: str = "4: ACTIVE") -> dict[str, str]:
    port = f"{IB}/{name}/ports/1"
    return {
        f"{port}/state": f"{state}\n",
        f"{port}/rate": "400 Gb/sec (4X NDR)\n",
        f"{port}/link_layer": "InfiniBand\n",
    }


def verdict(finding: Finding | None) -> Verdict:
    assert finding is not None
    return finding.verdict


# -- GPUs ------------------------------------------------------------------------------------------


def test_a_machine_without_gpus_has_nothing_to_say_of_drivers_and_links() -> None:
    machine = with_torch(CPU_TORCH)
    assert verdict(compute.gpu(machine, NOTHING)) is Verdict.WARN
    assert compute.driver(machine, NOTHING) is None
    assert compute.gpu_topology(machine, NOTHING) is None
    assert network.gpu_direct(machine, NOTHING) is None


def test_gpus_are_named_and_old_ones_told_to_use_float32() -> None:
    found = compute.gpu(with_torch(GPU_TORCH), NOTHING)
    assert found == ok("NVIDIA H200, 141 GiB; NVIDIA H200, 141 GiB")
    old = {**GPU_TORCH, "gpus": [{**H200, "name": "V100", "capability": [7, 0]}]}
    assert compute.gpu(with_torch(old), NOTHING) == warn(
        "V100, 141 GiB", "V100: no bfloat16, use --dtype float32"
    )


@pytest.mark.parametrize(
    ("torch", "driver", "expected", "said"),
    [
        (GPU_TORCH, DRIVER, Verdict.OK, "570.86.15 (CUDA up to 12.8; torch was built for 12.8)"),
        (GPU_TORCH, OPEN_DRIVER, Verdict.OK, "570.86.15 (CUDA up to 12.8"),
        (
            {**GPU_TORCH, "cuda": "13.0"},
            DRIVER,
            Verdict.WARN,
            "newer driver, or a torch for CUDA 12",
        ),
        ({**GPU_TORCH, "driver_cuda": "13.0"}, DRIVER, Verdict.OK, "built for 12.8"),
        ({**GPU_TORCH, "driver_cuda": None}, "", Verdict.WARN, "--gpus all"),
        (CPU_TORCH, DRIVER, Verdict.WARN, "this torch is a CPU build"),
    ],
)
def test_the_driver_is_compared_with_what_torch_was_built_for(
    torch: dict[str, Any], driver: str, expected: Verdict, said: str
) -> None:
    found = compute.driver(with_torch(torch, driver), NOTHING)
    assert verdict(found) is expected
    assert said in str(found)


NVLINKED = """
\x1b[4mGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\tSYS\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tSYS\tPXB\t48-95\t1\t\tN/A
NIC0\tPIX\tSYS\t X \tSYS
NIC1\tSYS\tPXB\tSYS\t X

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
"""
ACROSS_SOCKETS = """
\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity
GPU0\t X \tSYS\t0-47\t0
GPU1\tSYS\t X \t48-95\t1
"""
ONE_FAR_ADAPTER = """
\tGPU0\tmlx5_0\tCPU Affinity
GPU0\t X \tNODE\t0-47
mlx5_0\tNODE\t X
"""


def test_links_between_gpus_are_counted() -> None:
    found = compute.gpu_topology(FakeMachine(topo=NVLINKED), NOTHING)
    assert found == ok("2 GPUs, pairs by link: NV18 1")
    across = compute.gpu_topology(FakeMachine(topo=ACROSS_SOCKETS), NOTHING)
    assert verdict(across) is Verdict.WARN
    assert "SYS 1" in str(across)
    far = compute.gpu_topology(FakeMachine(topo=ONE_FAR_ADAPTER), NOTHING)
    assert verdict(far) is Verdict.WARN
    assert "GPU0 far from every network adapter" in str(far)


def test_a_table_of_links_is_read_whatever_is_around_it() -> None:
    found = parse(NVLINKED)
    assert found is not None
    assert (found.gpus, found.adapters) == (("GPU0", "GPU1"), ("NIC0", "NIC1"))
    assert found.links["GPU1", "NIC1"] == "PXB"
    assert found.far_from_adapters == ()
    for text in ("", "NVIDIA-SMI has failed", "\n\n", "GPU0"):
        table = parse(text)
        assert table is None or len(table.gpus) < 2


# -- what moves KV ---------------------------------------------------------------------------------


def test_adapters_are_told_with_state_and_rate() -> None:
    up = FakeMachine(files={**adapter("mlx5_0"), "/dev/infiniband/uverbs0": ""})
    assert network.rdma(up, NOTHING) == ok("mlx5_0 400 Gb/sec InfiniBand")
    one_down = FakeMachine(files={**up.files, **adapter("mlx5_1", "1: DOWN")})
    assert network.rdma(one_down, NOTHING) == warn(
        "mlx5_0 400 Gb/sec InfiniBand, mlx5_1 DOWN", "not in use: mlx5_1"
    )
    assert "no port is active" in str(
        network.rdma(FakeMachine(files=adapter("mlx5_0", "2: INIT")), NOTHING)
    )
    hidden = network.rdma(FakeMachine(files=adapter("mlx5_0")), NOTHING)
    assert "/dev/infiniband is not here" in hidden.detail + hidden.advice
    assert network.rdma(FakeMachine(), NOTHING).detail == "no device"


def test_adapters_reach_gpus_by_a_kernel_module() -> None:
    machine = FakeMachine({("torch",): GPU_TORCH}, adapter("mlx5_0"))
    assert verdict(network.gpu_direct(machine, NOTHING)) is Verdict.WARN
    machine.files["/proc/modules"] = "nvidia_peermem 20480 0 - Live 0x0\n"
    assert verdict(network.gpu_direct(machine, NOTHING)) is Verdict.OK


def with_transports(usable: list[str], **missing: str) -> FakeMachine:
    found = {"usable": usable, "missing": missing, "plugins": ["POSIX", "UCX"]}
    moved = {"bytes_per_s": 5.3e9}
    rates: dict[tuple[str, ...], Found] = {("transfer", name): moved for name in usable}
    return FakeMachine({("transports",): found, **rates})


def test_nixl_is_good_only_when_it_moved_something() -> None:
    machine = with_transports(["nixl", "shm"])
    assert network.nixl(machine, NOTHING) == ok(
        "UCX reads 5.3 GB/s from another process; plugins: POSIX, UCX"
    )
    machine.probes["transfer", "nixl"] = "nothing came within 20 s"
    assert verdict(network.nixl(machine, NOTHING)) is Verdict.FAIL
    without = network.nixl(with_transports(["shm"], nixl="not installed; pip install X"), NOTHING)
    assert (without.verdict, without.detail) == (Verdict.WARN, "not installed; pip install X")


def test_without_any_transport_kv_cannot_be_handed_over() -> None:
    found = network.transports(with_transports(["nccl", "shm"], nixl="not installed"), NOTHING)
    assert found == ok("nccl, shm 5.3 GB/s", "not usable: nixl (not installed)")
    assert network.transports(with_transports([], shm="needs Linux"), NOTHING) == fail(
        "none is usable: KV cannot be handed over", "not usable: shm (needs Linux)"
    )


def test_ports_that_are_taken_are_named() -> None:
    machine = FakeMachine(taken=(9000,))
    assert network.ports(machine, NOTHING) == ok("8000 and 50051 are free")
    found = network.ports(machine, Wanted(ports=(9000, 9001)))
    assert (found.verdict, found.detail) == (Verdict.WARN, "in use: 9000")


# -- memory and limits -----------------------------------------------------------------------------


def test_memory_is_what_the_container_leaves() -> None:
    said = {"/proc/meminfo": f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n"}
    assert memory.memory(FakeMachine(files=said, memory=32 * GIB), NOTHING) == ok(
        "32.0 GiB free of 64.0"
    )
    found = memory.memory(FakeMachine(files=said, memory=GIB), NOTHING)
    assert found.verdict is Verdict.WARN
    assert found.detail == "1.0 GiB free of 64.0, by a limit of the container"


def test_shared_memory_of_a_container_is_small_unless_asked_for() -> None:
    assert verdict(memory.shared_memory(FakeMachine(), NOTHING)) is Verdict.OK
    small = memory.shared_memory(FakeMachine(disks={"/dev/shm": 64 << 20}), NOTHING)
    assert (small.verdict, small.detail) == (Verdict.WARN, "/dev/shm has 64 MiB free")
    assert verdict(memory.shared_memory(FakeMachine(disks={}), NOTHING)) is Verdict.WARN


def test_a_limit_on_locked_memory_matters_with_rdma_only() -> None:
    limits = {resource.RLIMIT_MEMLOCK: 8 << 20}
    assert memory.locked_memory(FakeMachine(), NOTHING) == ok("no limit")
    assert verdict(memory.locked_memory(FakeMachine(limits=limits), NOTHING)) is Verdict.OK
    bound = FakeMachine(files=adapter("mlx5_0"), limits=limits)
    assert "LimitMEMLOCK" in memory.locked_memory(bound, NOTHING).advice
    bound.files["/proc/self/status"] = "Name:\tx\nCapEff:\t0000000000004000\n"
    assert verdict(memory.locked_memory(bound, NOTHING)) is Verdict.OK


def test_few_open_files_are_few_clients() -> None:
    assert verdict(memory.open_files(FakeMachine(), NOTHING)) is Verdict.OK
    few = FakeMachine(limits={resource.RLIMIT_NOFILE: 1024})
    assert memory.open_files(few, NOTHING).detail == "limit of 1024"
    assert verdict(memory.open_files(few, NOTHING)) is Verdict.WARN


# -- disk, Redis, clock ----------------------------------------------------------------------------


def test_the_disk_is_timed_when_a_directory_is_given() -> None:
    assert services.disk(FakeMachine(), NOTHING) is None
    wanted = Wanted(store_dir="/nvme")
    fast = {"write": 2.1e9, "read": 6.4e9, "direct": True}
    machine = FakeMachine({("disk", "/nvme"): fast}, disks={"/nvme": 100 * GIB})
    assert services.disk(machine, wanted) == ok(
        "/nvme writes 2.1 and reads 6.4 GB/s in a row, 100 GiB free"
    )
    machine.probes["disk", "/nvme"] = {**fast, "read": 2e8}
    assert verdict(services.disk(machine, wanted)) is Verdict.WARN
    machine.probes["disk", "/nvme"] = {**fast, "direct": False}
    assert "O_DIRECT" in str(services.disk(machine, wanted))
    machine.probes["disk", "/nvme"] = "/nvme cannot be written: Permission denied"
    assert verdict(services.disk(machine, wanted)) is Verdict.FAIL


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("Redis at r:6379 cannot be used: Authentication required.", "BATON_REDIS_PASSWORD"),
        ("… invalid username-password pair or user is disabled.", "BATON_REDIS_PASSWORD"),
        ("… [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "BATON_REDIS_CA_FILE"),
        ("… No permissions to access a key", "begin with the prefix"),
        ("ModuleNotFoundError: No module named 'redis'", "baton-llm[redis]"),
        ("… Error 111 connecting to r:6379", "is it running"),
    ],
)
def test_a_redis_that_cannot_be_used_comes_with_the_remedy(error: str, remedy: str) -> None:
    found = services.redis(FakeMachine({("redis",): error}), Wanted(redis=True))
    assert found.verdict is Verdict.FAIL
    assert remedy in found.advice


def test_redis_is_asked_only_when_it_is_given() -> None:
    assert verdict(services.redis(FakeMachine(), NOTHING)) is Verdict.OK
    answer = {"address": "r:6379", "ping_s": 0.0004, "offset_s": 0.001}
    machine = FakeMachine({("redis",): answer})
    found = services.redis(machine, Wanted(redis=True))
    assert found == ok("r:6379 takes reads and writes, 0.4 ms away")
    machine.probes["redis",] = {**answer, "ping_s": 0.08}
    assert verdict(services.redis(machine, Wanted(redis=True))) is Verdict.WARN


@pytest.mark.parametrize(
    ("kernel", "offset", "expected"),
    [
        ({"synchronised": True, "error_s": 0.004}, None, Verdict.OK),
        ({"synchronised": True, "error_s": 0.004}, 0.002, Verdict.OK),
        ({"synchronised": True, "error_s": 0.004}, -3.0, Verdict.WARN),
        ({"synchronised": False, "error_s": 16.0}, 0.002, Verdict.WARN),
        ("OSError: adjtimex", None, Verdict.WARN),
        ("OSError: adjtimex", 0.002, Verdict.OK),
    ],
)
def test_the_clock_is_kept_in_step(kernel: Found, offset: float | None, expected: Verdict) -> None:
    redis: Found = {"address": "r:6379", "ping_s": 0.001, "offset_s": offset}
    machine = FakeMachine({("clock",): kernel, ("redis",): redis})
    assert verdict(services.clock(machine, Wanted(redis=True))) is expected


# -- the command -----------------------------------------------------------------------------------


def checks(monkeypatch: pytest.MonkeyPatch, **found: Finding | None) -> None:
    made = {name: lambda machine, wanted, f=finding: f for name, finding in found.items()}
    monkeypatch.setattr(command, "CHECKS", made)


def test_only_failures_end_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    checks(monkeypatch, one=ok("fine"), two=warn("missing", "get one"), three=None)
    result = run(main.app, ["doctor", "--json"])
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert said["ok"] is True
    assert [check["name"] for check in said["checks"]] == ["one", "two"]
    assert said["checks"][1] == {
        "name": "two",
        "verdict": "warn",
        "detail": "missing",
        "advice": "get one",
    }
    checks(monkeypatch, one=ok("fine"), two=fail("broken", "mend it"))
    result = run(main.app, ["doctor"])
    assert result.exit_code == 1
    assert "mend it" in result.stdout


def test_the_table_fits_a_narrow_terminal() -> None:
    lines = [command.Line("shared memory", warn("x" * 150, "do " * 60))]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(command.table(lines))
    assert all(len(line) <= 80 for line in captured.get().splitlines())
    assert captured.get().count("x") == 150


def test_options_reach_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Wanted] = []

    def check(machine: ThisMachine, wanted: Wanted) -> Finding:
        asked.append(wanted)
        return ok("")

    monkeypatch.setattr(command, "CHECKS", {"one": check})
    argv = ["doctor", "--store-dir", "/nvme", "--redis", "redis://r:1", "--port", "9000"]
    CliRunner().invoke(main.app, argv, env={"BATON_REDIS": ""})
    assert asked == [Wanted("/nvme", True, (9000, 50051))]
