"""Ten times what a modelled cluster can do, in virtual time: see `sim.overload`."""

from __future__ import annotations

import pytest

from sim.overload import Overload, to_peak
from sim.overload_shapes import WORKLOADS

_BY_NAME = {workload.name: workload for workload in WORKLOADS}


@pytest.mark.parametrize("name", ["even", "decoding is slow"])
def test_ten_times_the_capacity(name: str) -> None:
    """The first is held up by prompts, the second by the time per output token."""
    made = Overload(_BY_NAME[name], seed=0).measure(times=10.0, seconds=6.0)
    half, full, over, _, after = made
    assert over.offered_per_s > 5 * over.answered_per_s
    assert to_peak(made) >= 0.85
    assert over.goodput_per_s >= 0.85 * over.answered_per_s  # what is let in is let in for good
    assert full.goodput_per_s >= 0.9 * full.offered_per_s
    assert over.running <= 32
    assert over.refused_late == 0
    assert over.reject_p99_s < 0.01
    assert set(over.codes) == {"ok", "overloaded"}
    assert after.goodput_per_s == after.answered_per_s
    assert after.codes.get("overloaded", 0) <= 1  # what was let in before is still there at first
    assert after.ttft_p50_s < 2 * half.ttft_p50_s
