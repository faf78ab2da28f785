"""A process of the cluster as a child of this one: started, its output relayed, ended."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from baton.errors import InternalError

_TAIL_LINES = 12
_PIPES_CLOSE_S = 2.0
_LINE_LIMIT = 1 << 20  # bytes; a longer line is cut, never waited for


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to start, under which name."""

    name: str
    argv: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)


class Child:
    """Runs one process. `run` owns it: when `run` returns or is cancelled the process is gone.

    The process holds the read end of a pipe whose only write end is ours, so it notices (and is
    told by --exit-with-parent to end) when this process disappears without a word.
    """

    def __init__(self, spec: ChildSpec, on_line: Callable[[str, str], None]) -> None:
        self.spec = spec
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._announced: asyncio.Event = asyncio.Event()
        self._exited: asyncio.Event = asyncio.Event()
        self._announcement: dict[str, Any] = {}
        self._unwanted = False  # `stop` came before there was a process

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines that the process wrote."""
        return tuple(self._tail)

    async def run(self) -> int:
        """Start the process and return its exit code (negative: the signal that ended it)."""
        self._process = await asyncio.create_subprocess_exec(
            *self.spec.argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(self.spec.environ),
            limit=_LINE_LIMIT,
            # Its own session: Ctrl-C on the terminal reaches us alone, and we end the children in
            # order.
            start_new_session=True,
        )
        if self._unwanted:
            self._signal(signal.SIGKILL)
        try:
            async with asyncio.TaskGroup() as group:
                relays = [
                    group.create_task(self._relay(self._process.stdout, self._on_stdout)),
                    group.create_task(self._relay(self._process.stderr, self._log)),
                ]
                code = await self._process.wait()
                # A helper of the dead process may hold its pipes open for a moment longer.
                await asyncio.wait(relays, timeout=_PIPES_CLOSE_S)
                for relay in relays:
                    relay.cancel()
            return code
        finally:
            self._signal(signal.SIGKILL)
            await self._process.wait()
            self._exited.set()

    async def announcement(self, timeout_s: float) -> dict[str, Any]:
        """The JSON object with `"event": "listening"` that the process prints when it serves."""
        async with asyncio.timeout(timeout_s):
            await self._announced.wait()
        return self._announcement

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> bool:
        """Ask the process to end; kill it after `grace_s` seconds or once `hurry` is set.

        Returns whether it ended by itself.
        """
        if self._process is None or self._exited.is_set():
            self._unwanted = True
            return True
        self._signal(signal.SIGTERM)
        if await _first_of(self._exited, hurry, grace_s):
            return True
        self._signal(signal.SIGKILL)
        await self._exited.wait()
        return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def _relay(
        self, stream: asyncio.StreamReader | None, take: Callable[[str], None]
    ) -> None:
        if stream is None:
            raise InternalError("a child was started without pipes")
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than the limit; the reader has dropped it
                continue
            if not line:
                return
            take(line.decode("utf-8", "replace").rstrip())

    def _on_stdout(self, line: str) -> None:
        if line.startswith("{"):
            try:
                event = orjson.loads(line)
            except orjson.JSONDecodeError:
                event = None
            if isinstance(event, dict) and event.get("event") == "listening":
                self._announcement = event
                self._announced.set()
                return
        self._log(line)

    def _log(self, line: str) -> None:
        if line:
            self._tail.append(line)
            self._on_line(self.spec.name, line)


async def _first_of(done: asyncio.Event, hurry: asyncio.Event, timeout_s: float) -> bool:
    """Wait for either event or the timeout; whether `done` was set."""
    waits = [asyncio.ensure_future(event.wait()) for event in (done, hurry)]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    return done.is_set()
