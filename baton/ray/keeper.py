"""Keeps one process running in its slot, until it is stopped or given up.

placing -> starting -> running -> (it ends, or its node is lost) -> pausing -> placing -> ...
        -> given up                                              -> given up
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from baton.ray.config import Restart
from baton.ray.place import Command, Ended, Events, Node, PlaceLost, Running, Slot, sleep_unless

WRONG = 2  # exit code of a process whose configuration cannot work
_FEW = 3  # failures in a row, while nothing has worked yet

Result = TypeVar("Result")


class State(StrEnum):
    PLACING = "placing"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"  # before it starts again
    GIVEN_UP = "given up"
    STOPPED = "stopped"


class NodeGone(PlaceLost):
    """The only node that a slot may be on has gone: there is nothing to keep any more."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is kept. `make` is asked before every start; `begun`, if there is one, runs beside the
    process and must not raise."""

    name: str
    slot: Slot
    make: Callable[[Node], Awaitable[Command]]
    begun: Callable[[Node, Running], Coroutine[Any, Any, None]] | None = None


class Keeper:
    """`run` owns the process and the slot: when it returns or is cancelled both are gone."""

    def __init__(
        self, work: Work, restart: Restart, events: Events, patient: Callable[[], bool]
    ) -> None:
        """`patient()`: whether what fails has worked before, so that trying again makes sense."""
        self.name = work.name
        self.state = State.PLACING
        self.node: Node | None = None  # where it is, or was last
        self.starts = 0
        self.tail: tuple[str, ...] = ()
        self.why = ""  # how it ended last
        self._work = work
        self._restart = restart
        self._events = events
        self._patient = patient
        self._failures = 0  # in a row
        self._running: Running | None = None
        self._by_force = False  # how it ended last
        self._renewing = False  # its command was made before something changed
        self._stopping = asyncio.Event()
        self._done = asyncio.Event()

    @property
    def kept(self) -> bool:
        """Whether it runs or will run again."""
        return self.state is not State.GIVEN_UP and not self._stopping.is_set()

    def resign(self) -> None:
        """Start it no more; `stop` must follow."""
        self._stopping.set()

    async def run(self) -> None:
        """Until stopped or given up: `state` says which."""
        try:
            while await self._once():
                pass
            if self.state is not State.GIVEN_UP:
                self.state = State.STOPPED
        finally:
            try:
                if self._running is not None:
                    await self._running.kill()
                await self._work.slot.release()
            finally:
                self._done.set()

    async def stop(self, grace_s: float, hurry: asyncio.Event) -> bool:
        """End the process, by force after `grace_s` or once `hurry` is set. Returns whether it
        ended by itself, after `run` has let go of the slot."""
        self._stopping.set()
        if self._running is not None:
            await self._end(self._running, grace_s, hurry)
        await self._done.wait()
        return not self._by_force

    async def renew(self, grace_s: float) -> None:
        """Let it start again with a new command. That is no failure."""
        self._renewing = True
        if self._running is not None:
            await self._running.stop(grace_s)

    async def _once(self) -> bool:
        """Start the process and see it end; whether it should be started again."""
        began = asyncio.get_running_loop().time()
        ended: Ended | None = None
        try:
            node = await self._settle()
            if node is not None and self._hopeless(None):
                return self._give_up()
            began = asyncio.get_running_loop().time()
            if node is not None:
                ended = await self._live(node)
        except NodeGone as error:
            self.why = error.message
            text = f"{self.name} ends: {self.why}"
            self._events.event("node_gone", text, name=self.name, why=self.why)
            return False
        except PlaceLost as error:
            self.why, self._by_force = f"was lost: {error.message}", True
        else:
            if ended is not None:
                self.why, self.tail = ending(ended.code), ended.tail
                self._by_force = ended.code == -signal.SIGKILL
        if self._stopping.is_set():
            return False
        if self._renewing:
            self._renewing = False
            return True
        lived_s = asyncio.get_running_loop().time() - began
        return await self._pause(lived_s, ended)

    async def _settle(self) -> Node | None:
        """Be placed; on another node than before with a clean record. None: it is to stop."""
        self.state = State.PLACING
        node = await self._unless_stopped(self._work.slot.node())
        if node is None:
            return None
        before, self.node = self.node, node
        if before is not None and before.id != node.id:
            self._failures = 0
            text = f"{self.name} moves from node {before.name} to node {node.name}"
            self._events.event("moved", text, name=self.name, before=before.name, node=node.name)
        return node

    async def _live(self, node: Node) -> Ended | None:
        """One life of the process. None: it was stopped before it had begun."""
        self.state = State.STARTING
        running = await self._unless_stopped(self._start(node))
        if running is None:
            return None
        self._running, self.state = running, State.RUNNING
        self.starts += 1
        if self._stopping.is_set() or self._renewing:  # just now: they have not seen it
            await running.kill()
        begun = self._work.begun or _nothing
        beside = asyncio.create_task(begun(node, running), name=f"{self.name} begins")
        try:
            return await running.wait()
        finally:
            self._running = None
            beside.cancel()
            await asyncio.gather(beside, return_exceptions=True)

    async def _start(self, node: Node) -> Running:
        self._renewing = False
        return await self._work.slot.start(await self._work.make(node))

    async def _pause(self, lived_s: float, ended: Ended | None) -> bool:
        """Wait before the next start; False when there should be none."""
        restart = self._restart
        self._failures = 1 if lived_s >= restart.stable_s else self._failures + 1
        # What was lost may have died with its node; that shows when it has a place again.
        if ended is not None and self._hopeless(ended):
            return self._give_up()
        delay = pause_s(restart, self._failures)
        self.state = State.PAUSING
        self._events.event(
            "process_exited",
            f"{self.name} {self.why}; starting it again in {delay:.1f} s",
            name=self.name,
            code=ended.code if ended is not None else None,
            why=self.why,
        )
        return not await sleep_unless(self._stopping, delay)

    def _give_up(self) -> bool:
        self.state = State.GIVEN_UP
        text = f"{self.name} {self.why}; it is not started again"
        failures = self._failures
        self._events.event("given_up", text, name=self.name, failures=failures, why=self.why)
        return False

    def _hopeless(self, ended: Ended | None) -> bool:
        most = self._restart.failures
        if self._patient():
            return bool(most) and self._failures >= most
        wrong = ended is not None and ended.code == WRONG
        return wrong or self._failures >= min(most or _FEW, _FEW)

    async def _unless_stopped(self, work: Awaitable[Result]) -> Result | None:
        """Await `work`, or cancel it and return None once this keeper is to stop."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stopping.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    async def _end(self, running: Running, grace_s: float, hurry: asyncio.Event) -> None:
        ending = asyncio.ensure_future(running.stop(grace_s))
        hurried = asyncio.ensure_future(hurry.wait())
        try:
            await asyncio.wait({ending, hurried}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                await running.kill()
        finally:
            ending.cancel()
            hurried.cancel()
            await asyncio.gather(ending, hurried, return_exceptions=True)


def pause_s(restart: Restart, failures: int) -> float:
    """Before the start that follows so many failures in a row."""
    doublings = min(failures - 1, 32)
    return float(min(restart.backoff_s * 2**doublings, restart.max_backoff_s))


def ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


async def _nothing(node: Node, running: Running) -> None:
    """For what has nothing to do when it has begun."""
