"""What the kernel says of a process: memory, file descriptors, threads, shared memory, CPU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.chaos.processes import ChaosFailed, Kept

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ")
_FIELD = re.compile(r"^(Rss|Pss|Anonymous): +(\d+) kB")
_HEAP_BYTES = 64 << 20  # glibc's: what a thread's arena is made of begins at a multiple of it
_TICKS = os.sysconf("SC_CLK_TCK")
SETTLED_S = 300.0  # of a life: caches and pools fill first
FITTED_S = 300.0  # after that, the least that a slope is fitted to


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one process at one time. KiB; `cpu_s` since it began. `arenas`: of `anonymous`, what
    glibc's malloc has for threads other than the first, in use or kept for them."""

    at_s: float
    pid: int
    rss: int
    pss: int
    anonymous: int
    arenas: int
    fds: int
    threads: int
    segments: int
    cpu_s: float


def look(pid: int, at_s: float) -> Sample:
    """Raises OSError when it has ended."""
    at = Path(f"/proc/{pid}")
    memory = sizes((at / "smaps").read_text())
    stat = (at / "stat").read_text().rpartition(")")[2].split()
    maps = (at / "maps").read_text()
    return Sample(
        at_s=round(at_s, 1),
        pid=pid,
        rss=memory["Rss"],
        pss=memory["Pss"],
        anonymous=memory["Anonymous"],
        arenas=memory["arenas"],
        fds=sum(1 for _ in (at / "fd").iterdir()),
        threads=int(stat[17]),
        segments=len(set(re.findall(r"/dev/shm/\S+", maps))),
        cpu_s=(int(stat[11]) + int(stat[12])) / _TICKS,
    )


def sizes(smaps: str) -> dict[str, int]:
    """Rss, Pss, Anonymous and arenas of all mappings, in KiB.

    A heap of an arena is a writable mapping with the rest of its 64 MiB reserved behind it.
    """
    found = Counter({"Rss": 0, "Pss": 0, "Anonymous": 0, "arenas": 0})
    maybe_until, maybe = 0, 0  # the mapping before, if it may be a heap: its end, what is in it
    for line in smaps.splitlines():
        if (mapping := _MAPPING.match(line)) is not None:
            begin, end = (int(number, 16) for number in mapping.groups()[:2])
            access = mapping[3]
            if access == "---p" and begin == maybe_until:
                found["arenas"] += maybe
            starts = access == "rw-p" and begin % _HEAP_BYTES == 0 and end - begin < _HEAP_BYTES
            maybe_until, maybe = (end if starts else 0), 0
        elif (field := _FIELD.match(line)) is not None:
            found[field[1]] += int(field[2])
            if field[1] == "Anonymous":
                maybe = int(field[2])
    return dict(found)


class Watch:
    """Samples of every process by name, and how many segments were in /dev/shm."""

    def __init__(self, kept: Mapping[str, Kept]) -> None:
        self._kept = kept
        self.samples: dict[str, list[Sample]] = {name: [] for name in kept}
        self.segments: list[tuple[float, int]] = []

    async def run(self, period_s: float) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while True:
            at_s = loop.time() - began
            for name, kept in self._kept.items():
                with contextlib.suppress(OSError, ChaosFailed):  # it is dead just now
                    kept.note_segments()
                    self.samples[name].append(look(kept.pid, at_s))
            there = {path for kept in self._kept.values() for path in kept.segments}
            self.segments.append((round(at_s, 1), sum(path.exists() for path in there)))
            await asyncio.sleep(period_s)


@dataclass(frozen=True, slots=True)
class Life:
    """One process from its first sample to its last. Slopes in MiB per hour, of what came after
    the first minutes; None for short lives."""

    name: str
    began_s: float
    seconds: float
    rss_mib: tuple[float, float]  # when settled (or first), last
    pss_slope: float | None
    anonymous_slope: float | None
    arenas_mib: tuple[float, float]
    fds: tuple[int, int]
    threads: tuple[int, int]
    cpu_share: float  # of one core


def lives(samples: Mapping[str, Sequence[Sample]]) -> list[Life]:
    found = []
    for name, all_of_it in samples.items():
        for pid in dict.fromkeys(sample.pid for sample in all_of_it):
            own = [sample for sample in all_of_it if sample.pid == pid]
            if len(own) > 1:
                found.append(_life(name, own))
    return found


def _life(name: str, own: Sequence[Sample]) -> Life:
    first, last = own[0], own[-1]
    seconds = last.at_s - first.at_s
    settled = [sample for sample in own if sample.at_s - first.at_s >= SETTLED_S]
    fitted = settled if settled and last.at_s - settled[0].at_s >= FITTED_S else []
    start = (settled or own)[0]
    return Life(
        name=name,
        began_s=first.at_s,
        seconds=round(seconds, 1),
        rss_mib=(round(start.rss / 1024, 1), round(last.rss / 1024, 1)),
        pss_slope=_slope([(sample.at_s, sample.pss) for sample in fitted]),
        anonymous_slope=_slope([(sample.at_s, sample.anonymous) for sample in fitted]),
        arenas_mib=(round(start.arenas / 1024, 1), round(last.arenas / 1024, 1)),
        fds=(start.fds, last.fds),
        threads=(start.threads, last.threads),
        cpu_share=round((last.cpu_s - first.cpu_s) / seconds, 3),
    )


def _slope(points: Sequence[tuple[float, int]]) -> float | None:
    """Of the least-squares line through (seconds, KiB), in MiB per hour."""
    if len(points) < 3:
        return None
    mean_t = sum(t for t, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    above = sum((t - mean_t) * (y - mean_y) for t, y in points)
    below = sum((t - mean_t) ** 2 for t, _ in points)
    return round(above / below * 3600 / 1024, 2)
