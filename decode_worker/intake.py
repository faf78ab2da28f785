"""Take over an attempt from a prefill worker: reserve, read, verify, admit.

    fetch:  attach -> reserve blocks -> read ranges as they appear -> release -> released
    admit:  the sequence goes on after the first token, which came with the KV

Whatever happens, the blocks end up with the sequence, free, or in quarantine until the transport
says that nothing writes to them any more; and the attempt gets one Finish.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from baton.engine.loop import Engine
from baton.errors import BatonError, Cancelled, DeadlineExceeded
from baton.kv.handoff.reader import Fetched, HandoffReader, Place
from baton.rpc.errors import to_wire
from baton.tasks import OwnedTasks
from baton.types.fleet import Peer
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
)

log = logging.getLogger(__name__)

INTAKE_TIMEOUT_S = 120.0  # for a task without a deadline of its own

# The prefill worker has told the conductor how these ended; here is nothing to add.
_ENDED_THERE = ("finished", Cancelled.code)


class Intake:
    """Owns one task per attempt that is being taken over. `run` must be running."""

    def __init__(
        self,
        engine: Engine,
        reader: HandoffReader,
        report: Callable[[tuple[AttemptOutput, ...]], None],
        begun: Callable[[AttemptId, SampledToken], None],
    ) -> None:
        """`begun` is told of attempts that go on here, and after which token."""
        self._engine = engine
        self._reader = reader
        self._report = report
        self._begun = begun
        self._owned = OwnedTasks()
        self._tasks: dict[AttemptId, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Own the attempts' tasks until cancelled; then end them all."""
        await self._owned.run()

    def start(self, task: GenerationTask, peer: Peer) -> None:
        """Begin to take the attempt over; its outputs and its Finish go to `report`."""
        taking = self._owned.begin(self._take(task, peer), f"intake {task.attempt}")
        self._tasks[task.attempt] = taking
        taking.add_done_callback(lambda _: self._tasks.pop(task.attempt, None))

    def cancel(self, attempt: AttemptId) -> bool:
        """Stop taking it over, if it is. Its Finish(CANCELLED) is reported right away."""
        taking = self._tasks.pop(attempt, None)
        if taking is None:
            return False
        taking.cancel()
        self._finish(attempt, Finish(FinishReason.CANCELLED))
        return True

    async def _take(self, task: GenerationTask, peer: Peer) -> None:
        loop = asyncio.get_running_loop()
        limit_s = INTAKE_TIMEOUT_S if task.timeout_s is None else task.timeout_s
        deadline = loop.time() + limit_s
        try:
            fetched = await self._fetch(task, peer, limit_s)
            left_s = None if task.timeout_s is None else deadline - loop.time()
            self._admit(replace(task, timeout_s=left_s), fetched)
        except BatonError as error:
            self._fail(task.attempt, error)
        except Exception as error:
            log.exception("attempt %s could not be taken over", task.attempt)
            self._fail(task.attempt, error)

    async def _fetch(self, task: GenerationTask, peer: Peer, limit_s: float) -> Fetched:
        tokens = len(task.prompt) + len(task.output)

        async def reserve() -> Place:
            reserved = await self._engine.reserve(
                task.attempt, tokens, limit_s, task.priority, task
            )
            return Place(reserved.blocks, reserved.cached)

        return await self._reader.fetch(task.attempt, peer, reserve, limit_s, task.trace)

    def _admit(self, task: GenerationTask, fetched: Fetched) -> None:
        """The engine owns the blocks afterwards, or they are free again."""
        prefilled = fetched.prefilled
        # From here on the engine cancels it; forgetting comes first because admitting may end it.
        cancelled = self._tasks.pop(task.attempt, None) is None
        try:
            if cancelled:  # when the last message had come, but before this coroutine went on
                raise Cancelled(f"{task.attempt} was cancelled")
            if task.timeout_s is not None and task.timeout_s <= 0:
                raise DeadlineExceeded("the deadline passed while KV was handed over")
            self._begun(task.attempt, prefilled.first)  # first: admitting may end it
            self._engine.admit(
                task,
                fetched.blocks,
                prefilled.first,
                prefilled.cached_tokens,
                fetched.stats.spans(),
            )
        except BaseException:
            self._engine.unreserve(task.attempt)  # every read has ended: nothing writes to them
            raise

    def _fail(self, attempt: AttemptId, error: Exception) -> None:
        if isinstance(error, BatonError) and error.code in _ENDED_THERE:
            self._finish(attempt, Finish(FinishReason.CANCELLED))
        else:
            self._finish(attempt, Finish(FinishReason.ERROR, to_wire(error)))

    def _finish(self, attempt: AttemptId, finish: Finish) -> None:
        self._report((AttemptOutput(attempt, finish=finish),))
