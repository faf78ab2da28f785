"""Restarting every process in turn, as an operator does who installs a new version."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from bench.chaos.cluster import Cluster, Shape
from bench.chaos.processes import ChaosFailed, Kept
from bench.chaos.waiting import until

END_S = 120.0  # beyond the drain time: an end that takes longer is a hang
READY_S = 240.0  # a worker loads torch and its model, on a machine that is busy


@dataclass(frozen=True, slots=True)
class Restart:
    """`began`: of the event loop. Seconds from SIGTERM to the end, from there until ready."""

    name: str
    began: float
    drain_s: float
    start_s: float
    exit_code: int

    @property
    def ended(self) -> float:
        return self.began + self.drain_s + self.start_s


def everybody(shape: Shape) -> tuple[str, ...]:
    """Conductors first, then decode workers: those that have just started know these least."""
    workers = sorted(shape.workers, key=lambda name: (name.startswith("prefill"), name))
    return (*shape.conductor_names, *workers, "store-0", "redis")


async def roll(
    cluster: Cluster, names: Sequence[str], tell: Callable[[Restart], None]
) -> list[Restart]:
    """The next one gets its SIGTERM as soon as the last one says that it is ready. Raises
    ChaosFailed."""
    restarts = []
    for name in names:
        restarts.append(await _restart(cluster, name))
        tell(restarts[-1])
    return restarts


async def _restart(cluster: Cluster, name: str) -> Restart:
    kept, now = cluster.kept[name], asyncio.get_running_loop().time
    lives, began = len(kept.exit_codes), now()
    kept.send(signal.SIGTERM)

    async def has_ended() -> bool:
        return len(kept.exit_codes) > lives

    await _must(kept, "has not ended", has_ended, cluster.shape.drain_timeout_s + END_S)
    ended = now()
    await _must(kept, "is not ready", lambda: cluster.is_ready(name), READY_S)
    return Restart(name, began, ended - began, now() - ended, kept.exit_codes[lives])


async def _must(
    kept: Kept, what: str, condition: Callable[[], Awaitable[bool]], within_s: float
) -> None:
    if not await until(condition, within_s):
        raise ChaosFailed(f"{kept.name} {what} after {within_s:g} s:\n{kept.log_tail()}")
