"""Keeps the runner busy: while step n runs, step n + 1 lies ready.

    threads:   step 1             | step 2                  | step 3      ...
    loop:      schedule 2           commit 1, schedule 3      commit 2, schedule 4

What changes while a step runs (a request came, another was cancelled) is in the next one all the
same: if that has not been launched yet, it is taken back and scheduled anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from baton.engine.batch import Batch, BatchItem, BatchResult, Runner
from baton.engine.events import KvReady
from baton.engine.figures import EngineFigures
from baton.engine.publish import Publisher
from baton.engine.scheduler import MAX_IN_FLIGHT, Advance, Scheduler
from baton.engine.sequence import Ending, Sequence, error_ending
from baton.engine.step import LayersReady, MakeSteps
from baton.errors import InternalError

log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Steps that may fail one after the other before the engine gives up, and with it the process."""


class Stepper:
    """Belongs to the event loop. `announce` and `report` are called with what a step did, `want`
    after sequences may have entered; they may call `news`, `take_back` and `stop`."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        publisher: Publisher,
        by_layers: bool,
        announce: Callable[[tuple[KvReady, ...]], None],
        report: Callable[[tuple[Advance, ...]], None],
        want: Callable[[], None],
        make_steps: MakeSteps,
        figures: EngineFigures,
    ) -> None:
        self._scheduler = scheduler
        self._publisher = publisher
        self._by_layers = by_layers
        self._announce = announce
        self._report = report
        self._want = want
        self._wake = asyncio.Event()
        self._steps = make_steps(runner, self._wake.set)
        self._changed = False  # there is news that the step behind the running one lacks
        self._stopped = False
        self._failures = 0  # in a row
        self._figures = figures
        self._begun_at = 0.0  # the step that runs: when it was put, or the one before it ended

    async def run(self) -> None:
        """Run steps until `stop`; when cancelled or failed, `close` must follow.

        Raises InternalError when MAX_FAILURES steps failed in a row.
        """
        self._steps.open()
        while not self._stopped or self._steps.in_flight:
            self._schedule()
            await self._wake.wait()  # without a deadline: whatever changes the state sets it
            self._wake.clear()
            self._handle_events()

    def stop(self) -> None:
        """Ask `run` to end after the step that is running."""
        self._stopped = True
        self.take_back()
        self._wake.set()

    async def close(self, ending: Ending) -> None:
        """Wait for the steps that are running, which nothing can interrupt, and end all that is in
        them."""
        self._stopped = True
        await self._steps.close()
        for batch in self._scheduler.in_flight:
            self._discard(batch, ending)

    def news(self) -> None:
        """The next step may have to be another one."""
        self._changed = True
        self._wake.set()

    def settled(self, sequence: Sequence) -> None:
        """A sequence in a step in flight has all the KV now that it began on."""
        running = self._steps.running
        if running is not None and running.items[0].sequence == sequence.number:
            self._begin_running()

    def take_back(self) -> None:
        """Withdraw the step behind the running one, if it has not been launched."""
        batch = self._steps.take_back()
        if batch is not None:
            self._report(self._scheduler.withdraw(batch))

    def _schedule(self) -> None:
        """Put steps until one is ready behind the one that runs."""
        if self._changed:
            self._changed = False
            self.take_back()
        now = asyncio.get_running_loop().time()
        while not (
            self._stopped
            or self._steps.recovering
            or self._steps.in_flight == MAX_IN_FLIGHT
            or (batch := self._scheduler.schedule(now)) is None
        ):
            if not self._steps.in_flight:
                self._begun_at = now
            published = self._scheduler.to_publish(batch)
            if published and not self._steps.in_flight:
                self._begin(batch)
            self._steps.put(batch, self._goes_by_layers(published), self._scheduler.gate(batch))
        self._want()

    def _handle_events(self) -> None:
        for event in self._steps.events():
            if isinstance(event, LayersReady):
                self._announce(self._publisher.layers_ready(event.layer_end))
                continue
            if isinstance(event.outcome, BatchResult):
                self._commit(event.batch, event.outcome)
            elif event.outcome is None:
                self._report(self._scheduler.withdraw(event.batch))
            else:
                self._fail(event.batch, event.outcome)
            self._begun_at = asyncio.get_running_loop().time()
            self._begin_running()

    def _goes_by_layers(self, published: Iterable[tuple[Sequence, BatchItem]]) -> bool:
        return self._by_layers and any(
            self._publisher.goes_by_layers(item) for _, item in published
        )

    def _begin_running(self) -> None:
        running = self._steps.running
        if running is not None and not self._steps.recovering:
            self._begin(running)

    def _begin(self, batch: Batch) -> None:
        """Nothing runs before this step any more."""
        self._announce(self._publisher.begin(self._scheduler.to_publish(batch)))

    def _commit(self, batch: Batch, result: BatchResult) -> None:
        self._failures = 0
        self._announce(self._publisher.end())
        now = asyncio.get_running_loop().time()
        self._figures.note_step(batch, now - self._begun_at)
        self._report(self._scheduler.commit(batch, result, now))

    def _fail(self, batch: Batch, error: Exception) -> None:
        self._failures += 1
        self._figures.failed_steps.value += 1
        log.error(
            "Step %d with %d sequences failed (%d in a row).",
            batch.step,
            len(batch.items),
            self._failures,
            exc_info=error,
        )
        self._discard(batch, _blame(batch, error))
        if self._failures == MAX_FAILURES:
            raise InternalError(
                f"{MAX_FAILURES} steps in a row failed; the last one with: {error}"
            ) from error

    def _discard(self, batch: Batch, ending: Ending) -> None:
        self._publisher.abandon()
        self._report(self._scheduler.discard(batch, ending))


def _blame(batch: Batch, error: Exception) -> Ending:
    """One sequence alone is to blame for its step. Of several nobody knows which: all may be tried
    again elsewhere, until the one that makes steps fail is alone, or has failed too often."""
    return error_ending(error, innocent=len(batch.items) > 1)
