"""CPU lists, what a process may use, and how workers share it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton import cpus
from baton.cpus import choose_placement, cpu_quota, format_cpus, parse_cpus, share_cpus
from baton.errors import ConfigError

sets = st.frozensets(st.integers(0, 200), min_size=1)


@given(sets)
def test_lists_survive_being_written(chosen: frozenset[int]) -> None:
    assert parse_cpus(format_cpus(sorted(chosen))) == tuple(sorted(chosen))


def test_lists_are_short() -> None:
    assert format_cpus((0, 1, 2, 3, 8, 10, 11)) == "0-3,8,10-11"
    assert parse_cpus(" 0-3, 8") == (0, 1, 2, 3, 8)


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-", "1,,2", "-1", "0-99999999999"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="given as a list such as 0-3,8"):
        parse_cpus(text)


@given(sets, st.integers(1, 40))
def test_workers_share_fairly(chosen: frozenset[int], workers: int) -> None:
    parts = share_cpus(sorted(chosen), workers)
    assert len(parts) == workers
    if workers <= len(chosen):
        assert sorted(cpu for part in parts for cpu in part) == sorted(chosen)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    else:
        assert all(len(part) == 1 for part in parts)
        assert {cpu for part in parts for cpu in part} == chosen


def test_a_placement_has_a_thread_per_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "available_cpus", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(cpus, "cpu_quota", lambda: None)
    assert choose_placement("", 0) == cpus.Placement((0, 1, 2, 3), 4)
    assert choose_placement("1-2", 0) == cpus.Placement((1, 2), 2)
    assert choose_placement("1-2", 1) == cpus.Placement((1, 2), 1)
    with pytest.raises(ConfigError, match="--threads 3 is more than the 2 CPUs"):
        choose_placement("1-2", 3)
    with pytest.raises(ConfigError, match="may not run on 4-5; it has 0-3"):
        choose_placement("3-5", 0)
    monkeypatch.setattr(cpus, "cpu_quota", lambda: 2.5)
    assert choose_placement("", 0).threads == 2
    assert choose_placement("", 4).threads == 4  # asked for


def test_a_containers_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("150000\n")
    assert cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert cpu_quota(tmp_path) == 4.0


def test_a_placed_process_stays_on_its_cpus() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = (
        "import os; from baton.cpus import choose_placement;"
        f"choose_placement('{cpu}', 0).apply();"
        "print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == f"[{cpu}] 1"
