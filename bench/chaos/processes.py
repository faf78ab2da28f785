"""One process of the cluster under test: kept running, killed, stopped, continued."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_AGAIN_S = 0.2  # between the end of a process and its next start
_MAX_STARTS_IN_VAIN = 20
_STOP_S = 40.0


class ChaosFailed(Exception):
    """The cluster under test cannot be used: nothing can be said about its promises."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to start, under which name. `env` is added to ours."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class Kept:
    """Runs a command again whenever it ends, as an init system would, until `stop`.

    `run` owns the process: when it is cancelled the process is gone. The process ends by itself
    when its standard input does, so it never outlives us.
    """

    def __init__(self, command: Command, directory: Path) -> None:
        self.name = command.name
        self.segments: set[Path] = set()  # shared memory that any life of it has mapped
        self.exit_codes: list[int] = []  # of the lives that have ended
        self._vain = 0  # starts in a row that ended with an error
        self._command = command
        self._log = directory / f"{command.name}.log"
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int:
        """Of the present life. Raises ChaosFailed between two."""
        if self._process is None or self._process.returncode is not None:
            raise ChaosFailed(f"{self.name} does not run:\n{self.log_tail()}")
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def run(self) -> None:
        while not self._stopping:
            try:
                await self._live()
            finally:
                if self._process is not None and self._process.returncode is None:
                    self._process.kill()
                    await self._process.wait()
            if self._vain == _MAX_STARTS_IN_VAIN:
                raise ChaosFailed(f"{self.name} ends again and again:\n{self.log_tail()}")
            await asyncio.sleep(0 if self._stopping else _AGAIN_S)

    async def _live(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command.argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._command.env},
                start_new_session=True,
            )
        self.exit_codes.append(await self._process.wait())
        failed = self.exit_codes[-1] > 0  # and not by a signal
        self._vain = self._vain + 1 if failed else 0

    def send(self, number: signal.Signals) -> None:
        """Harmless when it has just ended."""
        self.note_segments()
        with contextlib.suppress(ProcessLookupError, ChaosFailed):
            os.kill(self.pid, number)

    def note_segments(self) -> None:
        """Remember the shared memory that it has mapped now."""
        with contextlib.suppress(OSError, ChaosFailed):
            maps = Path(f"/proc/{self.pid}/maps").read_text()
            self.segments |= {Path(path) for path in re.findall(r"/dev/shm/\S+", maps)}

    async def stop(self) -> int:
        """Ask it to end; kill it when it does not. Returns the exit code of its last life."""
        self._stopping = True
        if self._process is None:
            return 0
        self.note_segments()
        for number in (signal.SIGCONT, signal.SIGTERM):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
        try:
            async with asyncio.timeout(_STOP_S):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()

    def log_tail(self, lines: int = 15) -> str:
        text = self._log.read_text(errors="replace") if self._log.exists() else "(no log)"
        return "\n".join(text.splitlines()[-lines:])


def pids_with(variable: str) -> set[int]:
    """Living processes that were started with this environment variable."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            if variable.encode() in (directory / "environ").read_bytes().split(b"\0"):
                found.add(int(directory.name))
    return found
