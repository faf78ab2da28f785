"""The ceilings of a CPU by baton's own code, where it can run: products, reading memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from baton.bench.engine_rate import Rate
from baton.kv.transport.memory import cpu_pool
from baton.native import unavailable, variant
from baton.native.ceilings import matrix_peak, product_rate, read_bandwidth

_MIB = 1 << 20
_LEAST = 3  # measurements


def native_products(threads: int, budget_s: float, quick: bool) -> Iterator[Rate]:
    """Packed products, and for information what the units do without any memory."""
    used = variant()
    if used is None:
        return
    sizes = ((512, 4096, 4096), (2048, 2048, 2048), (2048, 1024, 1024), (1024, 2048, 8192))
    for rows, out, depth in sizes[2:3] if quick else sizes:
        best = _best(lambda: product_rate(threads, rows, out, depth, 3), budget_s)  # noqa: B023
        yield Rate(f"packed product {rows}x{out}x{depth}", best)
    peak = _best(lambda: matrix_peak(threads), budget_s)
    yield Rate(f"{used.title} without memory", peak, counts=False)


def native_reads(threads: int, sizes: list[int], budget_s: float) -> Iterator[Rate]:
    """Reading `sizes` bytes once, in huge pages where the kernel has them."""
    if unavailable():
        return
    memory = cpu_pool(max(sizes))
    for nbytes in sizes:
        best = _best(lambda: read_bandwidth(threads, memory.address, nbytes), budget_s)  # noqa: B023
        yield Rate(f"read of {nbytes // _MIB} MiB", best, nbytes)


def _best(measure: Callable[[], float], budget_s: float) -> float:
    end = time.perf_counter() + budget_s
    rates = [measure() for _ in range(_LEAST)]
    while time.perf_counter() < end:
        rates.append(measure())
    return max(rates)
