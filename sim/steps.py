"""What production code does in threads, in virtual time: steps of a modelled runner, and calls.

    begin: +---- layers of group 1 ----+---- layers of group 2 ----+ end: tokens
                              written, told               written, told

The step behind the running one begins as soon as that has ended, before anybody has heard of it,
as it does in a thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

from baton.engine.batch import Batch, BatchItem, BatchResult
from baton.engine.gate import Gate
from baton.engine.step import Event, LayersReady, StepEnded
from baton.errors import InternalError

T = TypeVar("T")
P = ParamSpec("P")

Compute = Callable[[float, Callable[[], None]], object]
"""Of a device that others share: calls back when it has spent so many seconds."""


class StepPace(Protocol):
    """What steps take. `queued`: the device has a queue, so that the step behind the running one
    cannot be taken back."""

    @property
    def queued(self) -> bool: ...

    def of(self, batch: Batch) -> float:
        """Seconds of a step that begins now."""


class StepRunner(Protocol):
    """What a modelled device computes, spread over a step by `ModelledSteps`."""

    @property
    def group_ends(self) -> Sequence[int]: ...

    def begin(self, batch: Batch) -> tuple[BatchItem, ...]: ...

    def write(self, items: Sequence[BatchItem], layer_begin: int, layer_end: int) -> None: ...

    def end(self, items: Sequence[BatchItem]) -> BatchResult: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """So much for a step, and for every token in it. Seconds."""

    step_s: float
    token_s: float
    queued: bool

    def of(self, batch: Batch) -> float:
        return self.step_s + self.token_s * batch.num_tokens


@dataclass(slots=True, eq=False)
class _Step:
    batch: Batch
    layers: bool
    items: tuple[BatchItem, ...] | None = None  # None: it has not begun
    seconds: float = 0.0  # on a device that is not slow now


class ModelledSteps:
    """Implements `baton.engine.step.Steps`."""

    def __init__(
        self,
        runner: StepRunner,
        pace: StepPace,
        slowness: Callable[[], float],
        wake: Callable[[], None],
        compute: Compute | None = None,
    ) -> None:
        self.recovering = False
        self._runner = runner
        self._pace = pace
        self._slowness = slowness  # what the pace is multiplied by now
        self._wake = wake
        self._compute = compute  # None: the device is this worker's alone
        self._steps: deque[_Step] = deque()  # those that have ended are in it until they were told
        self._ended = 0  # of these
        self._events: deque[Event] = deque()
        self._progress = asyncio.Event()

    def open(self) -> None:
        """There is no thread to start."""

    async def close(self) -> None:
        running = [step for step in self._steps if step.items is not None]
        self._steps = deque(running)
        while self._ended < len(self._steps):
            with suppress(asyncio.CancelledError):
                self._progress.clear()
                await self._progress.wait()
        self._steps.clear()

    @property
    def in_flight(self) -> int:
        return len(self._steps)

    @property
    def running(self) -> Batch | None:
        return self._steps[0].batch if self._steps else None

    def put(self, batch: Batch, layers: bool, gate: Gate | None = None) -> None:
        if gate is not None:
            raise InternalError("a modelled step begins when all its KV is there")
        self._steps.append(_Step(batch, layers))
        self._begin_next()

    def take_back(self) -> Batch | None:
        if len(self._steps) < 2 or self._pace.queued or self._steps[-1].items is not None:
            return None
        return self._steps.pop().batch

    def events(self) -> Iterator[Event]:
        while self._events:
            event = self._events.popleft()
            if isinstance(event, StepEnded):
                self._steps.popleft()
                self._ended -= 1
            yield event

    def _begin_next(self) -> None:
        """If the device is free and a step waits for it."""
        if self._ended == len(self._steps) or self._steps[self._ended].items is not None:
            return
        step = self._steps[self._ended]
        step.items = self._runner.begin(step.batch)
        step.seconds = self._pace.of(step.batch)
        self._go_on(step, 0)

    def _go_on(self, step: _Step, group: int) -> None:
        duration = step.seconds * self._slowness() / len(self._runner.group_ends)
        if self._compute is None:
            asyncio.get_running_loop().call_later(duration, self._group_done, step, group)
        else:
            self._compute(duration, partial(self._group_done, step, group))

    def _group_done(self, step: _Step, group: int) -> None:
        ends = self._runner.group_ends
        self._runner.write(step.items or (), ends[group - 1] if group else 0, ends[group])
        if step.layers:
            self._tell(LayersReady(ends[group]))
        if group + 1 < len(ends):
            self._go_on(step, group + 1)
            return
        self._tell(StepEnded(step.batch, self._runner.end(step.items or ())))
        self._ended += 1
        self._progress.set()
        self._begin_next()

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._wake()


class ModelledThreads:
    """Implements `kvstore.files.Threads`: a call takes `delay_s`, and happens at its end."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s

    def open(self) -> None:
        """There is no thread to start."""

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            await asyncio.sleep(self._delay_s)
        except asyncio.CancelledError:
            call(*args, **kwargs)  # a thread is not stopped
            raise
        return call(*args, **kwargs)

    def close(self) -> None:
        """There is no thread to end."""
