"""A running system: from its command lines to a server that answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.client import Ask, Target, complete, ready
from bench.process import Command, ProcessGroup, StartError, log_tail
from bench.shapes import FIRST_WORD
from bench.systems import Place, System

IDLE_SAMPLE_S = 10.0
PORTS = 6


@dataclass(frozen=True, slots=True)
class Startup:
    """Costs of a system without any load: seconds, CPU seconds per second, bytes."""

    ready_s: float
    idle_cpu_share: float
    memory_bytes: int
    processes: int


class Server:
    """One system on one model. `start` before anything else; `stop` in any state."""

    def __init__(self, system: System, place: Place, python: Path, vocab: int, log: Path) -> None:
        self.name = system.name
        self.log = log
        self.commands: Sequence[Command] = system.commands(place, python)
        self.processes = ProcessGroup(self.commands, log)
        model = str(place.model) if system.asks_for_path else place.model_name
        self.target = Target("127.0.0.1", place.port, model, system.text_only)
        self._system = system
        self._words = random.Random(f"warm-up/{system.name}")
        self._vocab = vocab
        self.ready_s = 0.0  # from the start of the processes until they said so

    @property
    def alive(self) -> bool:
        return self.processes.alive

    async def start(self) -> None:
        """Start and warm up.

        Raises StartError, with the end of the log, when it does not get there.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        self.log.unlink(missing_ok=True)
        self.processes.start()
        deadline = started + self._system.start_timeout_s
        while not await ready(self.target.host, self.target.port, self._system.ready_path):
            if not self.alive:
                raise StartError(f"{self.name} ended while starting:\n{log_tail(self.log)}")
            if clock() > deadline:
                waited_s = self._system.start_timeout_s
                raise StartError(f"{self.name} not ready in {waited_s:g} s:\n{log_tail(self.log)}")
            await asyncio.sleep(0.05)
        self.ready_s = clock() - started
        await self._answer(Ask(self._tokens(64), 8), timeout_s=120.0)
        # A full batch of the sizes to come, so that nothing is compiled or allocated on first use.
        batch = [Ask(self._tokens(512), 16) for _ in range(16)]
        await asyncio.gather(*(self._answer(ask, timeout_s=300.0) for ask in batch))

    async def idle(self) -> Startup:
        """What the server uses without requests."""
        before = self.processes.cpu_s()
        await asyncio.sleep(IDLE_SAMPLE_S)
        share = (self.processes.cpu_s() - before) / IDLE_SAMPLE_S
        usage = self.processes.usage()
        return Startup(self.ready_s, share, usage.memory_bytes, usage.processes)

    def park(self) -> None:
        self.processes.park()

    async def wake(self) -> None:
        """Continue after `park`. Raises StartError when no request succeeds any more."""
        self.processes.resume()
        await self._answer(Ask(self._tokens(64), 8), timeout_s=60.0)

    async def stop(self) -> None:
        await self.processes.stop()

    async def _answer(self, ask: Ask, timeout_s: float) -> None:
        """Try until a request succeeds: a server may need a moment after a start or a pause."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_s
        while True:
            outcome = await complete(self.target, ask, clock(), max(1.0, deadline - clock()))
            if outcome.error is None:
                return
            if clock() > deadline or not self.alive:
                tail = log_tail(self.log)
                raise StartError(f"{self.name} does not answer ({outcome.error}):\n{tail}")
            await asyncio.sleep(0.2)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._words.choices(range(FIRST_WORD, self._vocab), k=count))
