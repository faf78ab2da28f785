"""What the router's benchmarks report, whichever part they measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from baton.bench.stats import percentile
from baton.rpc.tls import TlsConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a cluster is pretended to be."""

    workers: int
    blocks: int
    prompt_tokens: int
    block_size: int
    seed: int
    tls: TlsConfig | None = None  # files for the part that needs some

    @property
    def prompt_blocks(self) -> int:
        return self.prompt_tokens // self.block_size


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. `target` says what it is judged by, in words."""

    part: str
    name: str
    value: float
    unit: str
    target: str = ""


def timed(calls: Iterable[Callable[[], object]]) -> list[float]:
    """Seconds that each call took, sorted."""
    samples = []
    for call in calls:
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return sorted(samples)


def latencies(part: str, name: str, samples: list[float], target: str) -> tuple[Figure, Figure]:
    """p50 and p99 of sorted seconds, in µs."""
    return (
        Figure(part, f"{name}, p50", percentile(samples, 50) * 1e6, "µs"),
        Figure(part, f"{name}, p99", percentile(samples, 99) * 1e6, "µs", target),
    )
