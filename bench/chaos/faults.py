"""Killing or stopping a process, and seeing it come back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from bench.chaos.cluster import Cluster
from bench.chaos.phases import Placed
from bench.chaos.waiting import until

DEAD_S = 60.0  # until a stopped process is given up
LIVE_S = 120.0  # until it is back
REDIS_STOP_S = 4.0


class Kind(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    STORE = "kvstore"
    CONDUCTOR = "conductor"
    REDIS = "redis"


class Fault(StrEnum):
    NONE = "none"  # to compare with: everything else is the same
    KILL = "SIGKILL"
    STOP = "SIGSTOP"


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds. `noticed_s`: from SIGSTOP until the others had given the process up. `recovery_s`:
    from SIGKILL, or SIGCONT, until everybody saw it live. None: it did not happen, or need not."""

    noticed_s: float | None = None
    recovery_s: float | None = None


class Strike:
    """One signal to one process."""

    def __init__(self, cluster: Cluster, kind: Kind, fault: Fault, placed: Placed) -> None:
        self._cluster = cluster
        self._fault = fault
        self.victim = {
            Kind.PREFILL: placed.prefill,
            Kind.DECODE: placed.decode,
            Kind.STORE: "store-0",
            Kind.CONDUCTOR: placed.conductor,
            Kind.REDIS: "redis",
        }[kind]
        self._kept = cluster.kept[self.victim]
        self._life = 0
        self._at = 0.0

    def hit(self) -> None:
        self._at, self._life = _now(), self._kept.pid
        if self._fault is not Fault.NONE:
            self._kept.send(signal.Signals[self._fault.value])

    async def recover(self, answered: Callable[[], Awaitable[bool]]) -> Recovery:
        """Let it run again when it was stopped, and wait for it. `answered`: whether somebody else
        has given the marked answer."""
        if self._fault is Fault.NONE:
            return Recovery()
        noticed_s = None
        if self._fault is Fault.STOP:
            noticed_s = await self._given_up()
            if self.victim in self._cluster.shape.conductor_names:
                await until(answered, DEAD_S)
            self._at = _now()
            self._kept.send(signal.SIGCONT)
        else:
            await until(self._runs_again, LIVE_S)
        live = await until(partial(self._cluster.is_live, self.victim), LIVE_S)
        return Recovery(noticed_s, _now() - self._at if live else None)

    async def _given_up(self) -> float | None:
        if self.victim == "redis":  # there is nobody who would say so
            await asyncio.sleep(REDIS_STOP_S)
            return None
        dead = await until(partial(self._cluster.is_dead, self.victim), DEAD_S)
        return _now() - self._at if dead else None

    async def _runs_again(self) -> bool:
        return self._kept.runs and self._kept.pid != self._life


def _now() -> float:
    return asyncio.get_running_loop().time()
