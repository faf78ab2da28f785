"""The engine: schedule, execute, commit, until somebody stops it.

The process that owns the engine awaits `run()`; every other method belongs to the same event loop
and returns at once, `reserve` aside. Only the runner works elsewhere, in threads of its own.
Listener calls of one step come in this order: on_kv_ready, on_kv_filled, on_outputs, on_prefilled.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from itertools import count

from baton.counts import Counts
from baton.engine.batch import Runner
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.events import EngineListener, KvReady
from baton.engine.figures import EngineFigures
from baton.engine.loans import Loans
from baton.engine.publish import Publisher
from baton.engine.scheduler import Advance, Scheduler
from baton.engine.sequence import Ending, Sequence, error_ending
from baton.engine.step import MakeSteps, StepThreads
from baton.engine.stepper import Stepper
from baton.engine.waiting import Reservation, Reserved
from baton.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    StaleAttempt,
)
from baton.types.fleet import WorkerLoad
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    Span,
    WireError,
)

_CANCELLED = Ending(FinishReason.CANCELLED)
_HANDED_OFF = Ending(FinishReason.HANDED_OFF)


class Engine:
    """One model on one device: prefill, decode, or both.

    Every attempt that `submit` or `admit` accepted gets one Finish: through `on_outputs`, or, when
    it was handed off, from `release`. A reservation gets one only when it is cancelled, or the
    engine ends, before its owner gives it up.
    """

    def __init__(
        self,
        runner: Runner,
        pool: BlockPool,
        config: EngineConfig,
        listener: EngineListener,
        wall_clock: Callable[[], float] = time.time,
        make_steps: MakeSteps = StepThreads,
        figures: EngineFigures | None = None,
    ) -> None:
        if pool.num_blocks != config.num_blocks:
            raise InternalError(
                f"The pool has {pool.num_blocks} blocks, the configuration {config.num_blocks}."
            )
        self._config = config
        self._listener = listener
        self._wall_clock = wall_clock
        self._figures = figures or EngineFigures(Counts())
        self.loans = Loans(pool, self._given_back)
        self._scheduler = Scheduler(pool, config, self.loans)
        self._steps = Stepper(
            runner,
            self._scheduler,
            Publisher(pool, config.layout, config.by_layers_bytes),
            config.layer_groups > 1,
            self._announce,
            self._report,
            self._want,
            make_steps,
            self._figures,
        )
        self._sequences: dict[AttemptId, Sequence] = {}  # live ones, handed-off ones included
        self._reservations: dict[AttemptId, Reservation] = {}
        self._deadlines: dict[AttemptId, asyncio.TimerHandle] = {}
        self._numbers = count(1)
        self._stopped = False
        self._untold: deque[tuple[AttemptOutput, ...]] = deque()
        self._telling = False
        self._unix_offset: float | None = None

    # -- the loop ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop()`; then end whatever is left, and check the books.

        Cancelling works too; both wait for the step that is running, which nothing can interrupt.
        Raises InternalError when MAX_FAILURES steps failed in a row or the books are wrong.
        """
        last_word = _CANCELLED
        try:
            await self._steps.run()
        except Exception as error:
            last_word = error_ending(error, innocent=True)  # of this engine's end
            raise
        finally:
            self._stopped = True
            await self._steps.close(last_word)
            self._end_everything(last_word)
            self.check_integrity()

    def stop(self) -> None:
        """Ask `run` to end after the step that is running."""
        self._stopped = True
        self._steps.stop()

    # -- generating -------------------------------------------------------------------------

    def submit(self, task: GenerationTask, hand_off: bool = False, fetchable: int = 0) -> None:
        """Compute the task's context and generate; with `hand_off`, only the first token, and keep
        the KV for another worker until `release`. Of the first `fetchable` blocks, those that this
        pool lacks when the task's turn comes are asked of the listener (on_kv_wanted).

        Raises InvalidRequest when the context can never fit, Overloaded when too many wait or the
        engine has stopped, StaleAttempt when the attempt is known already.
        """
        self._require_new(task.attempt)
        self._config.require_fit(task)
        sequence = self._sequence(next(self._numbers), task, hand_off, fetchable)
        ending = self._scheduler.ending_of(sequence)
        if ending is None:
            self._scheduler.enqueue(sequence)
        self._track(sequence)
        if ending is not None:  # a resumed answer that was complete
            self._report((Advance(sequence, ending=ending),))
        self._steps.news()

    def cancel(self, attempt: AttemptId) -> None:
        """End a live attempt with Finish(CANCELLED); at once, or with the step that uses it.
        Harmless when it is unknown.

        A granted reservation's blocks go into quarantine, since a transfer may be writing to them:
        its owner still has to call `unreserve` or `end_quarantine`.
        """
        self._end(attempt, _CANCELLED)

    def release(self, attempt: AttemptId) -> Finish | None:
        """The handed-off KV is no longer needed. Returns the attempt's Finish(HANDED_OFF), for the
        caller to report, or None when it is unknown. Before on_prefilled, this is `cancel`."""
        sequence = self._sequences.get(attempt)
        if sequence is None:
            return None
        if not self._scheduler.is_handed_off(attempt):
            self.cancel(attempt)
            return None
        self._scheduler.remove(sequence, _HANDED_OFF)
        self._state_changed()
        return self._finish(sequence, _HANDED_OFF)

    # -- KV from elsewhere ------------------------------------------------------------------

    async def reserve(
        self,
        attempt: AttemptId,
        num_tokens: int,
        timeout_s: float,
        priority: int = 0,
        task: GenerationTask | None = None,
    ) -> Reserved:
        """Blocks for `num_tokens` tokens of KV that a transfer will bring, in line with everybody
        else who waits. With the `task` that they are for, those that have its KV already need none.
        The caller must end every reservation that it got with `admit`, `unreserve` or `quarantine`
        and `end_quarantine`.

        Raises InvalidRequest, Overloaded and StaleAttempt like `submit`; DeadlineExceeded after
        `timeout_s`; Cancelled after `cancel` (which reports the Finish).
        """
        self._require_new(attempt)
        num_blocks = self._config.layout.blocks_for(num_tokens)
        if task is not None:
            self._config.require_fit(task)
        self._config.require_blocks(num_blocks)
        granted: asyncio.Future[Reserved] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        context = None if task is None else self._sequence(number, task, hand_off=False)
        settle = partial(_settle, granted)
        reservation = Reservation(
            number, attempt, num_blocks, (priority, _now(), number), settle, context
        )
        self._scheduler.enqueue(reservation)
        self._reservations[attempt] = reservation
        try:
            async with asyncio.timeout(timeout_s):
                return await granted
        except TimeoutError:
            self.unreserve(attempt)
            raise DeadlineExceeded(
                f"No {num_blocks} KV blocks became free in {timeout_s:g} s: retry later."
            ) from None
        except asyncio.CancelledError:
            self.unreserve(attempt)
            raise

    def admit(
        self,
        task: GenerationTask,
        blocks: tuple[int, ...],
        first: SampledToken,
        cached_tokens: int = 0,
        spans: tuple[Span, ...] = (),
    ) -> None:
        """Go on after `first`, with the KV of everything before it in the attempt's reserved
        blocks, which belong to the sequence from here on. `first` itself is not reported again.
        The task's `timeout_s` counts from now. `spans`, in loop time, tell how the KV came.

        Raises StaleAttempt when the reservation has gone or was cancelled, and InternalError for KV
        or a first token that cannot be meant.
        """
        reservation = self._reservations.get(task.attempt)
        if reservation is None or reservation.quarantined or not reservation.blocks:
            raise StaleAttempt(f"{task.attempt} holds no reserved blocks (any more).")
        needed = self._config.layout.blocks_for(len(task.prompt) + len(task.output))
        if blocks != reservation.blocks or needed > len(blocks) or first.index != len(task.output):
            raise InternalError(f"{task.attempt} was admitted with KV that is not its own.")
        if not self._config.knows((first.token_id,)):
            raise InternalError(
                f"{task.attempt} begins with token {first.token_id}: there is none."
            )
        del self._reservations[task.attempt]
        sequence = self._sequence(reservation.number, task, hand_off=False)
        sequence.started_at = sequence.submitted_at
        sequence.brought = spans
        sequence.append(first, sequence.submitted_at)
        self._scheduler.admit(sequence, reservation, cached_tokens)
        self._track(sequence)
        ending = self._scheduler.ending_of(sequence)
        if ending is not None:
            self._end(task.attempt, ending)
        self._steps.news()

    def unreserve(self, attempt: AttemptId) -> None:
        """Free the reservation's blocks: nothing writes to them. Ignored when it is unknown, and
        while the blocks are in quarantine by `quarantine`."""
        reservation = self._reservations.get(attempt)
        if reservation is not None and not reservation.transfer_pending:
            self._drop(reservation)

    def quarantine(self, attempt: AttemptId) -> None:
        """Give a reservation up while its transfer may still write: its blocks stay out of use
        until `end_quarantine`. Ignored when it is unknown."""
        reservation = self._reservations.get(attempt)
        if reservation is not None and reservation.blocks:
            reservation.transfer_pending = True
            self._scheduler.quarantine(reservation)
            self._given_back()

    def end_quarantine(self, attempt: AttemptId) -> None:
        """The transport confirmed that nothing writes to the blocks. Ignored when unknown."""
        reservation = self._reservations.get(attempt)
        if reservation is not None:
            self._drop(reservation)

    def arrived(self, sequence: int, blocks: int) -> None:
        """What a sequence wanted (see EngineListener.on_kv_wanted) has come, as far as the first so
        many of the wanted blocks; nothing writes to any of them any more."""
        runs = self._scheduler.arrived(sequence, blocks, _now())
        if runs is None:  # it had ended, and may have left blocks to this transfer
            self._given_back()
            return
        if runs.steps:
            self._steps.settled(runs)
        self._state_changed()

    def layers_came(self, sequence: int, layer_end: int) -> None:
        """Of what a sequence wanted, layers [0, layer_end) of all blocks have come. They need not
        be good: nothing that is computed from them counts before `arrived` says so."""
        if self._scheduler.layers_came(sequence, layer_end):
            self._steps.news()

    # -- inspection -------------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        return self._scheduler.load()

    def check_integrity(self) -> None:
        """Raises InternalError when blocks or attempts are not accounted for. O(pool)."""
        self._scheduler.check_integrity()
        live = self._scheduler.attempts()
        known = Counter([*self._sequences, *self._reservations])
        if live != known:
            raise InternalError(f"The scheduler has {live - known}, the engine {known - live}.")
        if not self._deadlines.keys() <= self._sequences.keys():
            raise InternalError("A deadline outlived its attempt.")

    # -- endings ----------------------------------------------------------------------------

    def _end(self, attempt: AttemptId, ending: Ending) -> None:
        sequence = self._sequences.get(attempt)
        reservation = self._reservations.get(attempt)
        if sequence is not None:
            self._steps.take_back()  # or it may have to end with a step that has not begun
            if self._scheduler.remove(sequence, ending):
                self._report((Advance(sequence, ending=ending),))
        elif reservation is not None and not reservation.quarantined:
            if reservation.blocks:
                self._scheduler.quarantine(reservation)
            else:
                self._drop(reservation)
                reservation.settle(None)
            finish = Finish(ending.reason, ending.error)
            self._tell((AttemptOutput(attempt, finish=finish),))
        self._state_changed()

    def _end_everything(self, ending: Ending) -> None:
        for attempt in (*self._sequences, *self._reservations):
            self._end(attempt, ending)

    def _drop(self, reservation: Reservation) -> None:
        del self._reservations[reservation.attempt]
        self._scheduler.drop_reservation(reservation)
        self._given_back()

    def _finish(self, sequence: Sequence, ending: Ending) -> Finish:
        """The attempt is no longer live."""
        attempt = sequence.task.attempt
        del self._sequences[attempt]
        self._stop_deadline(attempt)
        spans = sequence.spans(_now(), self._unix_epoch())
        self._figures.preemptions.value += sequence.preemptions
        return Finish(ending.reason, ending.error, sequence.cached_tokens, spans)

    # -- telling the listener ---------------------------------------------------------------

    def _announce(self, ready: tuple[KvReady, ...]) -> None:
        if ready:
            self._listener.on_kv_ready(ready)

    def _want(self) -> None:
        wanted = self._scheduler.take_wanted()
        if wanted:
            self._listener.on_kv_wanted(wanted)

    def _tell(self, outputs: tuple[AttemptOutput, ...]) -> None:
        """What a listener causes while it listens is told next, not in between: an attempt's
        finish never overtakes its tokens."""
        self._untold.append(outputs)
        if self._telling:
            return
        self._telling = True
        try:
            while self._untold:
                self._listener.on_outputs(self._untold.popleft())
        finally:
            self._telling = False

    def _report(self, advances: tuple[Advance, ...]) -> None:
        """Books first, then calls: the listener may call the engine back."""
        outputs = []
        prefilled = []
        for advance in advances:
            sequence, token = advance.sequence, advance.token
            finish = self._finish(sequence, advance.ending) if advance.ending else None
            if token is not None or finish is not None:
                tokens = () if token is None else (token,)
                outputs.append(AttemptOutput(sequence.task.attempt, tokens, finish))
            if token is not None and token.index == len(sequence.task.output):
                self._figures.note_prompt(sequence)
            if advance.handed_off and token is not None:
                self._stop_deadline(sequence.task.attempt)
                prefilled.append((sequence, token))
        filled = self._scheduler.take_filled()
        if filled:
            self._listener.on_kv_filled(filled)
        settled = self._scheduler.take_settled()
        if outputs:
            self._tell(tuple(outputs))
        elif settled:
            self._listener.on_blocks_changed()
        for sequence, token in prefilled:
            attempt = sequence.task.attempt
            if attempt in self._sequences:
                self._listener.on_prefilled(
                    attempt, token, len(sequence.blocks), sequence.cached_tokens
                )

    # -- books ------------------------------------------------------------------------------

    def _sequence(
        self, number: int, task: GenerationTask, hand_off: bool, fetchable: int = 0
    ) -> Sequence:
        return Sequence(number, task, self._config.eos_token_ids, _now(), hand_off, fetchable)

    def _track(self, sequence: Sequence) -> None:
        task = sequence.task
        self._sequences[task.attempt] = sequence
        if task.timeout_s is not None:
            error = WireError(
                DeadlineExceeded.code, f"The deadline passed after {task.timeout_s:g} s."
            )
            self._deadlines[task.attempt] = asyncio.get_running_loop().call_later(
                task.timeout_s, self._end, task.attempt, Ending(FinishReason.ERROR, error)
            )

    def _stop_deadline(self, attempt: AttemptId) -> None:
        deadline = self._deadlines.pop(attempt, None)
        if deadline is not None:
            deadline.cancel()

    def _state_changed(self) -> None:
        """Blocks may have become free."""
        if not self._stopped:
            self._scheduler.grant_reservations()
        self._steps.news()

    def _given_back(self) -> None:
        """The same, at a moment without outputs."""
        self._state_changed()
        self._listener.on_blocks_changed()

    def _unix_epoch(self) -> float:
        """What turns loop time into unix time, from one look at both clocks."""
        if self._unix_offset is None:
            self._unix_offset = self._wall_clock() - _now()
        return self._unix_offset

    def _require_new(self, attempt: AttemptId) -> None:
        if self._stopped:
            raise Overloaded("This worker is shutting down: use another one.")
        if attempt in self._sequences or attempt in self._reservations:
            raise StaleAttempt(f"{attempt} is already being worked on.")


def _now() -> float:
    return asyncio.get_running_loop().time()


def _settle(granted: asyncio.Future[Reserved], blocks: Reserved | None) -> None:
    if granted.done():  # cancelled or timed out just now: its owner gives the blocks back
        return
    if blocks is None:
        granted.set_exception(Cancelled("The attempt was cancelled while it waited for blocks."))
    else:
        granted.set_result(blocks)
