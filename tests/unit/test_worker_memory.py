"""Sizing of KV pools, from figures that a machine, a container and a GPU could give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigError
from baton.free_memory import available_bytes
from baton.types.fleet import KvLayout
from baton.worker.config import WorkerConfig
from baton.worker.memory import (
    CPU_CAP_BYTES,
    MIB,
    Room,
    choose_num_blocks,
    weight_bytes,
)

LAYOUT = KvLayout("ab", "float32", 2, 2, 16, 32)  # 16 KiB a block
GIB = 1 << 30


def pool_bytes(room: Room, max_model_len: int = 1 << 20, **settings: Any) -> int:
    blocks = choose_num_blocks(WorkerConfig(**settings), LAYOUT, room, max_model_len)
    return blocks * LAYOUT.block_bytes


def test_what_was_asked_for_wins() -> None:
    room = Room(GIB, weights=MIB, workspace=MIB)
    assert pool_bytes(room, num_blocks=7, kv_memory_mib=1) == 7 * LAYOUT.block_bytes
    assert pool_bytes(room, kv_memory_mib=900, memory_share=0.1) == 900 * MIB


@pytest.mark.parametrize("asked", [{"kv_memory_mib": 973}, {"num_blocks": 1 << 30}])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_pool_too_large_is_refused_before_it_is_allocated(asked: Any, gpu: bool) -> None:
    room = Room(1024 * MIB, weights=50 * MIB, workspace=2 * MIB, gpu=gpu)
    most = 972 if gpu else 920
    with pytest.raises(ConfigError, match=f"does not fit: 1024 MiB are free.*-mib {most}"):
        pool_bytes(room, **asked)


def test_a_cpu_pool_is_half_of_what_is_left() -> None:
    room = Room(2 * GIB, weights=GIB // 2, workspace=GIB // 4)
    assert pool_bytes(room) == (2 * GIB - GIB // 2 - GIB // 4) // 2
    assert pool_bytes(room, memory_share=0.5) == (GIB - GIB // 2 - GIB // 4) // 2


def test_a_cpu_pool_has_a_cap_and_no_more_than_can_be_used() -> None:
    room = Room(64 * GIB, weights=GIB, workspace=GIB)
    assert pool_bytes(room) == CPU_CAP_BYTES
    assert pool_bytes(room, max_model_len=64, max_num_seqs=3) == 3 * 2 * LAYOUT.block_bytes


def test_a_gpu_pool_takes_most() -> None:
    room = Room(80 * GIB, weights=16 * GIB, workspace=2 * GIB, gpu=True)
    assert pool_bytes(room) == pytest.approx(0.85 * 80 * GIB - 18 * GIB, abs=LAYOUT.block_bytes)
    assert pool_bytes(room, memory_share=0.5) < 17 * GIB


@pytest.mark.parametrize("gpu", [False, True])
def test_no_room_for_a_block(gpu: bool) -> None:
    with pytest.raises(ConfigError, match="no room for a KV block of 16384 bytes: 1024 MiB"):
        pool_bytes(Room(GIB, weights=GIB, workspace=MIB, gpu=gpu))


def test_weights_take_more_in_a_wider_type(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors", "notes.txt"):
        (tmp_path / name).write_bytes(b"x" * 500)
    assert weight_bytes(tmp_path, "bfloat16", "bfloat16") == 1000
    assert weight_bytes(tmp_path, "bfloat16", "float32") == 2000
    assert weight_bytes(tmp_path, "float32", "bfloat16") == 500


class Machine:
    """A /proc and a /sys/fs/cgroup of its own."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        self.write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
        self.root = root

    def write(self, path: str, text: str) -> None:
        file = self.proc.parent / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def available(self) -> int:
        return available_bytes(self.proc, self.cgroup)


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert Machine(tmp_path).available() == 4000 * 1024


def test_every_control_group_above_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write("proc/self/cgroup", "0::/a/b\n")
    machine.write("cgroup/memory.stat", "anon 5\n")  # the root has no limit
    machine.write("cgroup/a/memory.max", "3000000\n")
    machine.write("cgroup/a/memory.current", "1500000\n")
    machine.write("cgroup/a/memory.stat", "anon 5\ninactive_file 500000\n")
    machine.write("cgroup/a/b/memory.max", "max\n")
    machine.write("cgroup/a/b/memory.current", "100\n")
    assert machine.available() == 2_000_000
    machine.write("cgroup/a/b/memory.max", "1000\n")
    machine.write("cgroup/a/b/memory.stat", "anon 5\n")
    assert machine.available() == 900


def test_the_first_version_of_control_groups(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write("proc/self/cgroup", "3:cpu,cpuacct:/x\n2:memory:/only/on/the/host\n")
    machine.write("cgroup/memory/memory.limit_in_bytes", "2000000\n")
    machine.write("cgroup/memory/memory.usage_in_bytes", "600000\n")
    machine.write("cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 100000\n")
    assert machine.available() == 1_500_000


def test_this_machine() -> None:
    assert available_bytes() > 0
