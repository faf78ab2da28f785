"""One modelled process: its tasks, its clock, and what can happen to it.

start --> running <--> stopped (SIGSTOP, SIGCONT)
             '--> dead (SIGKILL) --> buried, when the run is over
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from enum import StrEnum
from typing import Any, TypeVar

from sim.loop import OWNER, Clock, SimLoop, SimTask

T = TypeVar("T")

BURIAL_S = 60.0  # of virtual time, for the clean-up of tasks that nobody hears of any more
ROUNDS = 3  # of cancelling them


class Condition(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    DEAD = "dead"


class Process:
    """One life. `name` is where others reach it, `incarnation` tells its lives apart."""

    def __init__(self, name: str, incarnation: str, clock: Clock) -> None:
        self.name = name
        self.incarnation = incarnation
        self.clock = clock
        self.condition = Condition.RUNNING
        self.halted = False
        self.went_on_at = 0.0  # the network's time
        self.context = Context()
        self.context.run(OWNER.set, self)
        self._held: list[asyncio.Handle] = []
        self._fuse = 0
        self._at_fuse: Callable[[], None] | None = None
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimLoop)
        self._loop = loop
        self.gone = self._loop.create_future()  # done when it is dead

    def do(self, work: Callable[[], T]) -> T:
        """Call `work` as the process."""
        return self.context.run(work)

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """A task of the process."""
        return self._loop.create_task(work, name=name, context=self.context.copy())

    def tasks(self) -> Sequence[asyncio.Task[Any]]:
        """All that have not ended."""
        tasks: list[SimTask[Any]] = [
            task for task in asyncio.all_tasks(self._loop) if isinstance(task, SimTask)
        ]
        return sorted((task for task in tasks if task.owner is self), key=lambda task: task.number)

    def light_fuse(self, steps: int, then: Callable[[], None]) -> None:
        """Call `then`, which stops or kills it, when it has run so many more callbacks."""
        if not steps:
            then()
        elif self._at_fuse is None and self.condition is Condition.RUNNING:
            self._fuse, self._at_fuse = steps, then
            self.halted = True

    def stop(self) -> None:
        """Nothing of it runs until `go_on`."""
        if self.condition is Condition.RUNNING:
            self.condition, self.halted = Condition.STOPPED, True

    def go_on(self) -> None:
        """It does at once what it was kept from, in the order in which it came up."""
        if self.condition is Condition.STOPPED:
            self.condition, self.halted = Condition.RUNNING, False
            self.went_on_at = self._loop.now
            self._release()

    def kill(self) -> None:
        """Nothing of it ever runs again."""
        self.condition, self.halted = Condition.DEAD, True
        if not self.gone.done():
            self.gone.set_result(None)

    def hold(self, handle: asyncio.Handle) -> None:
        if self._at_fuse is None or self.condition is not Condition.RUNNING:
            self._held.append(handle)
            return
        handle._run()
        self._fuse -= 1
        if self._fuse <= 0:
            then, self._at_fuse = self._at_fuse, None
            self.halted = False
            then()

    async def bury(self) -> None:
        """Let the tasks of a dead process end, when that can no longer touch anything: Python
        has no other way to be rid of them."""
        tasks = self.tasks()
        self.halted = False
        self._release()
        for _ in range(ROUNDS):
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=BURIAL_S)
            tasks = self.tasks()
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]

    def _release(self) -> None:
        held, self._held = self._held, []
        self._loop.resume(held)
