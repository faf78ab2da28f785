"""A real cluster of `baton serve`, asked over HTTP, and the CPU time that its processes take."""

from __future__ import annotations

import asyncio
import os
import statistics
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.bench.stats import Outcome
from baton.bench.timelines import STAGES, ttft_parts
from baton.client.http import Client
from baton.errors import BatonError
from bench.calibration.load import Group, Planned, asks, name_of
from bench.calibration.overheads import Lone
from bench.calibration.results import timings
from bench.client import Target, complete
from bench.served import served

_REQUEST_S = 120.0
_SETTLE_S = 0.05  # after an answer: what it left to do is done
KV_MIB = 512
SERVE = (
    *("--dtype", "bfloat16", "--kv-memory-mib", str(KV_MIB), "--max-model-len", "4096"),
    *("--local-prefill-tokens", "0"),
)


@dataclass(frozen=True, slots=True)
class Cluster:
    """`pids`: of its processes by role; the conductor's is `front`."""

    target: Target
    vocabulary: int
    pids: Mapping[str, tuple[int, ...]]

    async def replay(self, planned: Sequence[Planned], seed: object) -> list[Outcome]:
        """Every request at its time, however slow the answers are; in the order of arrival."""
        clock = asyncio.get_running_loop().time
        given = asks(planned, self.vocabulary, seed)
        origin = clock()
        async with asyncio.TaskGroup() as group:
            tasks = []
            for one, ask in zip(planned, given, strict=True):
                await asyncio.sleep(max(0.0, origin + one.at_s - clock()))
                late_s = clock() - origin - one.at_s
                answer = complete(self.target, ask, origin, _REQUEST_S, late_s)
                tasks.append(group.create_task(answer))
        return [task.result() for task in tasks]

    async def ttft_parts(self, seed: object, count: int) -> dict[str, float]:
        """Mean seconds of each stage of a replay, as the conductor's traces tell them; empty when
        it has forgotten one."""
        try:
            async with Client(f"{self.target.host}:{self.target.port}") as client:
                found = [ttft_parts(await client.trace(name_of(seed, n))) for n in range(count)]
        except BatonError:
            return {}
        known = [parts for parts in found if parts]
        return {stage: _mean([parts[stage] for parts in known]) for stage in STAGES}

    async def alone(self, groups: Sequence[Group], seed: int) -> list[Lone]:
        """One group of equal requests after the other, each with what it took."""
        return [await self._group(group, f"{seed}-{n}") for n, group in enumerate(groups)]

    async def _group(self, group: Group, seed: str) -> Lone:
        planned = [Planned(0.0, group.prompt, group.output)] * group.together
        before = self.cpu_s()
        seen = timings(await self.replay(planned, seed))
        await asyncio.sleep(_SETTLE_S)
        used = {role: seconds - before[role] for role, seconds in self.cpu_s().items()}
        first = [timing.itl_s[0] for timing in seen if timing.itl_s]
        later = [gap for timing in seen for gap in timing.itl_s[1:]]
        return Lone(
            group.together,
            group.prompt,
            group.output,
            ttft_s=statistics.fmean(timing.ttft_s for timing in seen),
            first_gap_s=statistics.fmean(first) if first else None,
            gap_s=statistics.median(later) if later else None,
            front_cpu_s=used["front"],
            prefill_cpu_s=used["prefill"],
            decode_cpu_s=used["decode"],
        )

    def cpu_s(self) -> dict[str, float]:
        """By role; this process, the client, belongs to the front."""
        used = {role: sum(map(_cpu_s, pids)) for role, pids in self.pids.items()}
        used["front"] += _cpu_s(os.getpid())
        return used


def _mean(samples: Sequence[float]) -> float:
    return statistics.fmean(samples) if samples else 0.0


def _cpu_s(pid: int) -> float:
    """Of all threads, to the nanosecond: proc(5), schedstat."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            total += int((task / "schedstat").read_text().split()[0])
        except OSError:
            continue  # it has just ended
    return total / 1e9


@asynccontextmanager
async def serving(
    model: Path, vocabulary: int, prefill: int, decode: int, say: Callable[[str], None]
) -> AsyncIterator[Cluster]:
    """A cluster of its own, and this process on the CPUs of its conductor."""
    say(f"starting {prefill}P+{decode}D")
    before = os.sched_getaffinity(0)
    workers = ("--prefill", str(prefill), "--decode", str(decode))
    async with served([str(model), *workers, *SERVE]) as event:
        host, _, port = event["http"].rpartition(":")
        pids = await _pids(event["http"])
        os.sched_setaffinity(0, os.sched_getaffinity(pids["front"][0]))
        try:
            yield Cluster(Target(host, int(port), event["model"]), vocabulary, pids)
        finally:
            os.sched_setaffinity(0, before)


async def _pids(address: str) -> dict[str, tuple[int, ...]]:
    async with Client(address) as client:
        cluster = await client.cluster()
    pids: dict[str, tuple[int, ...]] = {"front": (int(cluster["conductors"][0]["pid"]),)}
    for worker in cluster["workers"]:
        role = str(worker["role"])
        pids[role] = (*pids.get(role, ()), int(worker["pid"]))
    return pids
