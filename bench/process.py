"""A server and all its processes: start, park, resume, end, and what they have used."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36


class StartError(Exception):
    """A server did not become ready; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Command:
    """One process to start. `env` is added to ours."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


def adopt_orphans() -> None:
    """Make processes whose parent dies ours, so that none of a server's can escape `descendants`.

    Does nothing where the kernel does not offer it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Stat:
    pid: int
    state: str
    parent: int
    session: int
    cpu_s: float  # of the process and of its children that ended


def _read_stat(pid: int) -> Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    cpu_s = sum(int(ticks) for ticks in fields[11:15]) / _TICKS
    return Stat(pid, fields[0], int(fields[1]), int(fields[3]), cpu_s)


def _all_stats() -> list[Stat]:
    pids = [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]
    return [stat for pid in pids if (stat := _read_stat(pid)) is not None]


def descendants(roots: Iterable[int], stats: Sequence[Stat]) -> list[Stat]:
    """The processes in `roots`, those in their sessions, and everything below them."""
    wanted = set(roots)
    sessions = set(wanted)
    found: dict[int, Stat] = {}
    growing = True
    while growing:
        growing = False
        for stat in stats:
            if stat.pid in found or stat.state == "Z":
                continue
            if stat.pid in wanted or stat.parent in wanted or stat.session in sessions:
                found[stat.pid] = stat
                wanted.add(stat.pid)
                growing = True
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Usage:
    """`cpu_s` since the start of the processes; `memory_bytes` with shared pages shared out."""

    cpu_s: float
    memory_bytes: int
    processes: int


class ProcessGroup:
    """The processes of one server: each command in a session of its own, with output to `log`."""

    def __init__(self, commands: Sequence[Command], log: Path) -> None:
        self._commands = tuple(commands)
        self._log = log
        self._children: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Raises StartError when a program is not there."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            for command in self._commands:
                try:
                    child = subprocess.Popen(
                        command.argv,
                        env={**os.environ, **command.env},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                except OSError as error:
                    raise StartError(f"{command.argv[0]}: {error.strerror}") from error
                self._children.append(child)

    @property
    def alive(self) -> bool:
        """Whether every started command still runs."""
        return bool(self._children) and all(child.poll() is None for child in self._children)

    def pids(self) -> list[int]:
        return [stat.pid for stat in self._stats()]

    def park(self) -> None:
        """Stop every process where it is; it keeps its memory and uses no CPU."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def usage(self) -> Usage:
        stats = self._stats()
        memory = sum(_memory_bytes(stat.pid) for stat in stats)
        return Usage(sum(stat.cpu_s for stat in stats), memory, len(stats))

    def cpu_s(self) -> float:
        """CPU seconds since the start. Cheaper than `usage`."""
        return sum(stat.cpu_s for stat in self._stats())

    async def stop(self, grace_s: float = 20.0) -> None:
        """Ask every process to end, then kill what is left. Safe to call at any time."""
        known = set(self.pids())
        for child in self._children:
            _kill(child.pid, signal.SIGTERM)
        self._signal(signal.SIGCONT)  # a stopped process cannot end
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._stats():
                    known.update(self.pids())
                    await asyncio.sleep(0.1)
        self.kill(known)

    def kill(self, known: Iterable[int] = ()) -> None:
        """End at once what is left of this server. `known`: pids seen before."""
        left = {stat.pid for stat in self._stats()}
        left |= {pid for pid in known if (s := _read_stat(pid)) and s.parent == os.getpid()}
        for pid in left:
            _kill(pid, signal.SIGKILL)
        for child in self._children:
            child.wait()
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)  # adopted ones
        self._children.clear()

    def _stats(self) -> list[Stat]:
        roots = [child.pid for child in self._children if child.poll() is None]
        sessions = [child.pid for child in self._children]
        return descendants({*roots, *sessions}, _all_stats()) if sessions else []

    def _signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            _kill(pid, number)


def log_tail(log: Path, lines: int = 30) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(text.splitlines()[-lines:])


def busy_s(cpus: Iterable[int]) -> float:
    """Seconds that these CPUs have been busy since boot, for whomever."""
    names = {f"cpu{cpu}" for cpu in cpus}
    total = 0.0
    for line in (_PROC / "stat").read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            ticks = [int(field) for field in fields[:8]]
            total += (sum(ticks) - ticks[3] - ticks[4]) / _TICKS  # without idle and I/O wait
    return total


def _memory_bytes(pid: int) -> int:
    """Proportional set size; 0 for a process that has gone."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
