"""Runs the runner in threads of its own: the event loop goes on while a step computes, and the
device goes on from one step to the next without the event loop.

    launcher:  launch(1) launch(2)      launch(3)       each as soon as the one before has returned
    waiter:    wait(1) ......... wait(2) ......... wait(3)
    loop:             1 ended           2 ended         puts the next step
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from baton.engine.batch import Batch, BatchResult, Launched, LayerCallback, Runner
from baton.engine.gate import Gate, GateClosed
from baton.errors import InternalError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayersReady:
    """KV of layers [0, layer_end) of the oldest step in flight is final."""

    layer_end: int


@dataclass(frozen=True, slots=True)
class StepEnded:
    """The oldest step has ended. Without an outcome it counts as never run: the one before it
    failed, and what it follows may not exist; or it began on KV that did not all come."""

    batch: Batch
    outcome: BatchResult | Exception | None


Event = LayersReady | StepEnded


class Steps(Protocol):
    """The steps in flight, in order, wherever they run: `StepThreads`, or modelled ones that take
    no thread and only virtual time. Belongs to the event loop."""

    recovering: bool
    """A step failed, and the one behind it has not ended: put no other."""

    def open(self) -> None: ...

    async def close(self) -> None:
        """Return when every launched step has ended, however often the waiting task is cancelled.
        Nobody is told of their results any more."""

    @property
    def in_flight(self) -> int: ...

    @property
    def running(self) -> Batch | None:
        """The oldest step in flight."""

    def put(self, batch: Batch, layers: bool, gate: Gate | None = None) -> None:
        """Launch a step after those in flight; with `layers`, tell of its LayersReady. One that
        has to pass a `gate` waits there only until another one is put behind it."""

    def take_back(self) -> Batch | None:
        """The step behind the one that runs, if it has not been launched: now it never is."""

    def events(self) -> Iterator[Event]:
        """What has happened since the last call, in order."""


MakeSteps = Callable[[Runner, Callable[[], None]], Steps]
"""Of a runner, and whom to tell that there are new events."""


class _Step:
    """Attributes are set before the thread that reads them is told of the step."""

    def __init__(self, batch: Batch, before: _Step | None, gate: Gate | None) -> None:
        self.batch = batch
        self.gate = gate
        self.before = before  # the step in flight that this one follows, until it has ended
        self.error: Exception | None = None
        self.launching: Future[Launched]
        self.waiting: Future[None]

    @property
    def spoilt(self) -> bool:
        """Whether the step before it failed."""
        return self.before is not None and self.before.error is not None

    def fail(self, error: Exception) -> None:
        """Note the error, unless it can have come from KV that is not what it should be."""
        gate = self.gate
        if gate is not None and (isinstance(error, GateClosed) or self.spoilt):
            return
        if gate is None or gate.settled():
            self.error = error


class StepThreads:
    """The steps in flight, in order. Belongs to the event loop, where `wake` tells of new events.
    Has no threads before `open` and after `close`."""

    def __init__(self, runner: Runner, wake: Callable[[], None]) -> None:
        self._runner = runner
        self._wake = wake
        self._steps: deque[_Step] = deque()
        self._events: deque[Event] = deque()
        self.recovering = False  # a step failed, and the one behind it has not ended: put no other

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="engine-step-launch")
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="engine-step-wait")

    async def close(self) -> None:
        """Return when every launched step has ended, however often the waiting task is cancelled:
        a thread cannot be interrupted, and nobody may have a step's blocks while it writes to them.
        Nobody is told of their results any more.
        """
        for step in self._steps:
            step.launching.cancel()
            if step.gate is not None:
                step.gate.close()
        ends = [asyncio.wrap_future(step.waiting) for step in self._steps]
        while not all(end.done() for end in ends):
            with suppress(asyncio.CancelledError):
                await asyncio.wait(ends)
        self._launcher.shutdown()
        self._waiter.shutdown()
        for step in self._steps:
            if step.error is not None:
                log.error("Step %d failed, the last one.", step.batch.step, exc_info=step.error)
        self._steps.clear()

    @property
    def in_flight(self) -> int:
        return len(self._steps)

    @property
    def running(self) -> Batch | None:
        """The oldest step in flight."""
        return self._steps[0].batch if self._steps else None

    def put(self, batch: Batch, layers: bool, gate: Gate | None = None) -> None:
        before = self._steps[-1] if self._steps else None
        if before is not None and before.gate is not None:
            before.gate.give_way()
        step = _Step(batch, before, gate)
        hop = self._layers_ready if layers else None
        step.launching = self._launcher.submit(self._launch, step, hop)
        step.waiting = self._waiter.submit(self._wait, step)
        self._steps.append(step)

    def take_back(self) -> Batch | None:
        """The step behind the one that runs, if it has not been launched: now it never is."""
        if len(self._steps) < 2 or not self._steps[-1].launching.cancel():
            return None
        return self._steps.pop().batch

    def events(self) -> Iterator[Event]:
        """What has happened since the last call, in order."""
        while self._events:
            event = self._events.popleft()
            if isinstance(event, StepEnded):
                self._steps.popleft()
                failed = self.recovering or isinstance(event.outcome, Exception)
                self.recovering = failed and bool(self._steps)
            yield event

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    # -- in the threads ---------------------------------------------------------------------

    def _launch(self, step: _Step, on_layers: LayerCallback | None) -> Launched:
        if step.spoilt:
            raise InternalError("the step before this one failed")
        try:
            return self._runner.launch(
                step.batch, on_layers, None if step.gate is None else step.gate.wait
            )
        except Exception as error:
            step.fail(error)
            raise

    def _layers_ready(self, layer_end: int) -> None:
        self._loop.call_soon_threadsafe(self._tell, LayersReady(layer_end))

    def _wait(self, step: _Step) -> None:
        outcome: BatchResult | Exception | None
        try:
            outcome = step.launching.result().wait()
            check_result(step.batch, outcome)
            if step.gate is not None and not step.gate.settled():
                outcome = None
        except CancelledError:
            return  # it was taken back
        except Exception as error:
            step.fail(error)
            outcome = step.error
        if step.spoilt:
            outcome = step.error = None
        step.before = None
        self._loop.call_soon_threadsafe(self._tell, StepEnded(step.batch, outcome))


def check_result(batch: Batch, result: BatchResult) -> None:
    """A runner that skips or invents tokens would corrupt answers in silence."""
    if len(result.tokens) != len(batch.items):
        raise InternalError(
            f"The runner answered {len(result.tokens)} items of a batch of {len(batch.items)}."
        )
    for item, token in zip(batch.items, result.tokens, strict=True):
        asked = None if item.sample is None else item.sample.index
        got = None if token is None else token.index
        if asked != got:
            raise InternalError(f"The runner sampled output index {got} where {asked} was asked.")
