"""Which GPUs there are, and which worker gets which."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cli.plan import place_on_devices
from baton.cli.serve_options import ServeOptions
from baton.gpus import VISIBLE, share_gpus, visible_gpus


@pytest.mark.parametrize(
    ("named", "gpus"),
    [
        ("", []),
        ("2", ["2"]),
        ("3, 1", ["3", "1"]),
        ("0,-1,2", ["0"]),
        ("GPU-8932f937,MIG-1", ["GPU-8932f937", "MIG-1"]),
        ("-1", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(named: str, gpus: list[str]) -> None:
    assert visible_gpus({VISIBLE: named}) == gpus


def test_devices_of_a_container_are_counted_from_zero(tmp_path: Path) -> None:
    for name in ("nvidia3", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1"]


@given(st.integers(1, 8), st.integers(1, 20))
def test_all_gpus_are_used_evenly_and_none_more_than_whole(gpus: int, workers: int) -> None:
    shares = share_gpus([str(number) for number in range(gpus)], workers)
    used = Counter(gpu for gpu, _ in shares)
    assert len(used) == min(gpus, workers)
    assert max(used.values()) - min(used.values()) <= 1
    assert all(share == 1 / used[gpu] for gpu, share in shares)


def test_workers_of_serve_get_gpus_of_their_own() -> None:
    environ = {VISIBLE: "4,6"}
    on = place_on_devices(ServeOptions(), environ, 3)
    assert on == [({VISIBLE: "4"}, 0.5), ({VISIBLE: "6"}, 1.0), ({VISIBLE: "4"}, 0.5)]


@pytest.mark.parametrize(("device", "named"), [("cpu", "0,1"), ("auto", "1"), ("auto", "")])
def test_without_a_choice_workers_share_the_device(device: str, named: str) -> None:
    options = ServeOptions(device=device)
    assert place_on_devices(options, {VISIBLE: named}, 2) == [({}, 0.5)] * 2
