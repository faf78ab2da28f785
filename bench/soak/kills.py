"""Kills processes at random, one or two at a time, and waits until everybody is there again."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from bench.chaos.cluster import Cluster
from bench.chaos.processes import ChaosFailed
from bench.chaos.waiting import until

_BACK_S = 180.0
_POLL_S = 1.0
_TWO = 0.2  # share of the times when two are killed at once
_WEIGHTS = {"prefill": 4, "decode": 4, "conductor": 3, "store": 1, "redis": 1}


@dataclass(frozen=True, slots=True)
class Kill:
    at_s: float
    names: tuple[str, ...]
    back_s: float  # until everybody saw them live again


class Killer:
    """`spared` are never killed: lives that are long enough to see memory grow."""

    def __init__(self, cluster: Cluster, seed: int, spared: Collection[str]) -> None:
        self._cluster = cluster
        self._draw = random.Random(seed)
        self._names = [name for name in cluster.kept if name not in spared]
        self.kills: list[Kill] = []

    async def run(self, pauses_s: tuple[float, float]) -> None:
        """Until cancelled. Raises ChaosFailed when somebody does not come back."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            await asyncio.sleep(self._draw.uniform(*pauses_s))
            names = self._choose()
            at = loop.time()
            pids = {name: self._cluster.kept[name].pid for name in names}
            for name in names:
                self._cluster.kept[name].send(signal.SIGKILL)
            if not await until(partial(self._all_back, pids), _BACK_S, _POLL_S):
                raise ChaosFailed(f"{names} were not back after {_BACK_S:g} s")
            self.kills.append(Kill(round(at - began, 1), names, round(loop.time() - at, 2)))

    def _choose(self) -> tuple[str, ...]:
        first = self._one_of(self._names)
        others = [name for name in self._names if name != first]
        if self._draw.random() < _TWO and others:
            return (first, self._one_of(others))
        return (first,)

    def _one_of(self, names: Sequence[str]) -> str:
        return self._draw.choices(names, [_WEIGHTS[name.partition("-")[0]] for name in names])[0]

    async def _all_back(self, killed: dict[str, int]) -> bool:
        for name, pid in killed.items():
            kept = self._cluster.kept[name]
            if not kept.runs or kept.pid == pid or not await self._cluster.is_live(name):
                return False
        return True
