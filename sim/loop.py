"""An event loop for many modelled processes: whatever runs belongs to one of them.

    handle ready --> whose? --> running: run it
                            --> stopped: kept until it goes on, as after SIGSTOP
                            --> dead:    never runs, as after SIGKILL: no `finally`, no farewell

A process is a value in the context of its tasks and callbacks, which asyncio passes on by itself.
So a process can be stopped or killed between any two steps of it, and what it leaves undone is
exactly what a real one leaves undone. What belongs to no process is the harness.

Everything is repeatable. Tasks hash by a serial number and not by their address, because asyncio
keeps them in sets and cancels them in the order of these.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, ContextVar
from itertools import count
from typing import Any, Protocol, TypeVar, TypeVarTuple, Unpack

from sim.virtual_time import VirtualTimeLoop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STEPS_AT_A_TIME = 200_000
"""More at one moment of virtual time are an endless loop."""
CANCELLED_TIMERS = 10_000
"""More, and most of all: they are dropped before their time. Deadlines of minutes are set for what
takes seconds."""


class Clock:
    """A machine's own: `offset` seconds ahead, and `rate` times as fast as it should be."""

    def __init__(self, offset: float = 0.0, rate: float = 1.0) -> None:
        self._offset = offset
        self._rate = rate

    def read(self, now: float) -> float:
        return self._offset + now * self._rate

    def when(self, shown: float) -> float:
        """The first moment at which it shows at least that. Never earlier: a timer that went off
        too soon would be set again for the same moment, for ever."""
        moment = (shown - self._offset) / self._rate
        while self.read(moment) < shown:
            moment = math.nextafter(moment, math.inf)
        return moment


class Owner(Protocol):
    """A process, as the loop sees it."""

    clock: Clock
    halted: bool

    def hold(self, handle: asyncio.Handle) -> None:
        """`handle` was due while the process was halted."""


OWNER: ContextVar[Owner | None] = ContextVar("owner", default=None)


class StandStill(RuntimeError):
    """Everything waits and no timer is set, or no time passes for want of an end of work."""


class SimTask(asyncio.Task[T]):
    """Hashes by its number, so that sets of tasks have the same order in every run."""

    def __init__(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        number: int,
        owner: Owner | None,
        **settings: Any,
    ) -> None:
        self.number = number
        self.owner = owner
        super().__init__(coro, **settings)

    def __hash__(self) -> int:
        return self.number


class SimLoop(VirtualTimeLoop):
    """Needs no selector: nothing but virtual time is ever waited for."""

    _ready: deque[asyncio.Handle]
    _scheduled: list[asyncio.TimerHandle]
    _timer_cancelled_count: int  # of these
    _stopping: bool

    def __init__(self, steps_at_a_time: int = STEPS_AT_A_TIME) -> None:
        super().__init__()
        self._steps_at_a_time = steps_at_a_time
        self.now = 0.0
        self.steps = 0  # that were run
        self._steps_now = 0  # since time has moved
        self._numbers = count()
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]

    def time(self) -> float:
        """As the clock of the process shows that asks."""
        owner = OWNER.get()
        return self.now if owner is None else owner.clock.read(self.now)

    def call_soon(
        self,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """Half of what a simulation does goes through here: without the checks of the original."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        owner = OWNER.get()
        moment = when if owner is None else owner.clock.when(when)
        return super().call_at(moment, callback, *args, context=context)

    def resume(self, held: list[asyncio.Handle]) -> None:
        """Run now what a halted process did not."""
        self._ready.extend(held)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, T], **settings: Any
    ) -> SimTask[T]:
        context: Context | None = settings.get("context")
        owner = OWNER.get() if context is None else context.get(OWNER)
        return SimTask(coro, next(self._numbers), owner, loop=loop, **settings)

    def _run_once(self) -> None:
        """Instead of BaseEventLoop's: run what is ready; if nothing is, time jumps."""
        ready, timers = self._ready, self._scheduled
        if not ready:
            self._jump()
        while timers and timers[0].when() <= self.now:
            ready.append(self._pop_timer())
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            owner = handle._context.get(OWNER)  # type: ignore[attr-defined]
            if owner is not None and owner.halted:
                owner.hold(handle)
                continue
            self._steps_now += 1
            handle._run()
        if self._steps_now > self._steps_at_a_time:
            self._steps_now = 0  # for the clean-up after it
            raise StandStill(f"time stands still at {self.now:.6f}: work has no end")

    def _jump(self) -> None:
        timers = self._scheduled
        while timers and timers[0].cancelled():
            self._pop_timer()
        if self._timer_cancelled_count > max(CANCELLED_TIMERS, len(timers) // 2):
            self._drop_cancelled()
        if self._stopping:
            return
        if not timers:
            raise StandStill("every task waits and no timer is set")
        self.steps += self._steps_now
        self._steps_now = 0
        self.now = max(self.now, timers[0].when())

    def _pop_timer(self) -> asyncio.TimerHandle:
        timer = heapq.heappop(self._scheduled)
        self._forget_timer(timer)
        return timer

    def _forget_timer(self, timer: asyncio.TimerHandle) -> None:
        timer._scheduled = False  # type: ignore[attr-defined]
        self._timer_cancelled_count -= timer.cancelled()

    def _drop_cancelled(self) -> None:
        for timer in self._scheduled:
            if timer.cancelled():
                self._forget_timer(timer)
        self._scheduled[:] = [timer for timer in self._scheduled if not timer.cancelled()]
        heapq.heapify(self._scheduled)
