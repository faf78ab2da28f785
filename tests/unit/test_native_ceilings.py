"""The native ceilings are plausible: no threshold on speed, but nothing may be free."""

from __future__ import annotations

import pytest

from baton.kv.transport.memory import cpu_pool
from baton.native.ceilings import matrix_peak, product_rate, read_bandwidth
from tests.native_kit import needs_native

pytestmark = needs_native

ANY_CPU = 1e14  # FLOP/s and bytes/s that no two threads reach


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rates_are_those_of_work_that_was_done(threads: int) -> None:
    """With more threads than CPUs, some are woken when the others have done everything."""
    memory = cpu_pool(4 << 20)
    assert 0 < read_bandwidth(threads, memory.address, memory.nbytes) < ANY_CPU
    assert 0 < product_rate(threads, 64, 96, 160, repeats=2) < ANY_CPU
    assert 0 < matrix_peak(threads) < ANY_CPU
