"""One coroutine per request: start attempts, merge what workers say, end exactly once.

    route -> StartPrefill + StartDecode -> outputs -> deltas -> end
      ^                                       |
      +---- another attempt, behind what -----+  an error that is retryable, or a lost worker
            the client has

Workers' messages and timers arrive in one inbox, so the coroutine has a single place where it
waits, and the timer of the deadline is always armed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from baton.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    NoWorker,
    Overloaded,
    WorkerLost,
    WorkerMoved,
)
from baton.tokenizer import Tokenizer
from baton.types.fleet import Role, WorkerState
from baton.types.registry import AnswerPlace
from baton.types.request import AttemptId, AttemptOutput, Finish
from conductor.admission import Admission
from conductor.answer_run import AnswerRun, Delta, Phase
from conductor.attempts import Attempts, Placer, peers
from conductor.fleet import Fleet
from conductor.goodput import Latencies
from conductor.inbox import Abort, Again, Event, Inbox, Late, Lost, Output
from conductor.link import Stage
from conductor.live import Live
from conductor.metrics import Metrics, Stopwatch
from conductor.predictions import Predictions
from conductor.records import LINGER_S, Records
from conductor.request import Request
from conductor.retries import Retries, Tries
from conductor.router import Decision, RouteOptions
from conductor.tenants.tenant import Amounts
from conductor.trace import Timeline, Traces

PEER_GRACE_S = 5.0  # how long the other worker may take to end an answer after its peer has gone
MAX_UNREAD = 4096  # outputs of an answer that wait for a client which reads more slowly
SETTLE_GRACE_S = 1.0  # how long the usage waits for the worker's last words after a stop string
WORKER_POLL_S = 0.1  # between looks whether there is a worker again


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Dispatcher:
    """Makes a `Serving` for each request."""

    def __init__(
        self,
        fleet: Fleet,
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...],
        metrics: Metrics,
        traces: Traces,
        admission: Admission,
        routing: RouteOptions,
        retries: Retries,
        records: Records,
        live: Live,
    ) -> None:
        self.fleet = fleet
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.metrics = metrics
        self.traces = traces
        self.admission = admission
        self.placer = Placer(fleet, routing)
        self.retries = retries
        self.records = records
        self.live = live

    def serve(self, request: Request) -> Serving:
        self.retries.budget.deposit()
        return Serving(self, request)


class Serving:
    """One request on its way through the workers. Also the listener of its attempts."""

    def __init__(self, parts: Dispatcher, request: Request) -> None:
        self._parts = parts
        self._request = request
        self._inbox = Inbox()
        self._runs = {
            f"{request.key}.{answer.index}": AnswerRun(
                request, answer, parts.tokenizer, parts.eos_ids
            )
            for answer in request.answers
        }
        unfinished = {name: run for name, run in self._runs.items() if run.phase is Phase.NEW}
        self._open = set(unfinished)  # answers that have not ended
        self._due = deque(unfinished.values())  # to begin an attempt at
        self._tries = {name: Tries(parts.retries, request.id) for name in self._runs}
        self._attempts = Attempts(parts.placer, request, self)
        self._places: dict[str, AnswerPlace] = {}  # where each answer is, for others to know
        self._handed_over = False
        self._failed_at: dict[str, frozenset[str]] = {}  # answer -> workers of its last attempt
        self._predictions = Predictions(parts.fleet, parts.metrics, parts.admission)
        self._timers: dict[Event, asyncio.TimerHandle] = {}  # of what has not come yet
        self._stopwatch = Stopwatch(parts.metrics, request.received, request.tracing.exemplar)
        self.timeline: Timeline = parts.traces.begin(request)

    @property
    def usage(self) -> Usage:
        """Complete once `deltas` has ended; prompts with several answers count once."""
        first_of_prompt = {run.answer.prompt_index: run for run in reversed(self._runs.values())}
        return Usage(
            prompt_tokens=self._request.prompt_tokens,
            completion_tokens=sum(run.completion_tokens for run in self._runs.values()),
            cached_tokens=sum(
                min(run.cached_tokens, len(run.answer.prompt)) for run in first_of_prompt.values()
            ),
        )

    @property
    def latencies(self) -> Latencies:
        """So far."""
        return self._stopwatch.latencies

    def taken(self) -> Amounts:
        """Of what its tenant is allowed."""
        usage = self.usage
        return Amounts(1, usage.prompt_tokens, usage.completion_tokens)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """What becomes known, in order; ends when every answer has ended.

        Raises the error that ended the request. Closing the generator early cancels all attempts
        at all workers; nothing in its clean-up waits.
        """
        try:
            late = DeadlineExceeded("the request's deadline passed before it was answered")
            self._arm(self._request.deadline, Abort(late))
            if self._request.sent:
                await self._adopt()
            error = await self._begin_due()
            while self._open and error is None:
                batch: list[Delta] = []
                error = self._absorb(await self._inbox.take(), batch)
                if self._due and error is None:
                    error = await self._begin_due()
                if batch:
                    yield batch
                    if self.timeline.passed_s is None and self._stopwatch.first_at is not None:
                        self.timeline.note_passed(asyncio.get_running_loop().time())
            if error is not None and not self._all_told:
                raise error
        finally:
            for timer in self._timers.values():
                timer.cancel()
            if not self._handed_over:
                self._note_places(LINGER_S)
            self._attempts.cancel_all("the request has ended")
            now = asyncio.get_running_loop().time()
            self._stopwatch.end(now)
            if self._stopwatch.first_at is not None:
                self._parts.admission.note_decode(now - self._stopwatch.first_at)

    @property
    def _all_told(self) -> bool:
        """Whether the client has all answers to their end: what goes wrong then is no error."""
        told = (Phase.SETTLING, Phase.DONE)
        return all(run.phase in told for run in self._runs.values())

    def abort(self, error: BatonError) -> None:
        """End the request with `error`."""
        self._inbox.put(Abort(error))

    def hand_over(self, error: BatonError) -> None:
        """End the request with `error` here, and let its workers go on: somebody adopts it."""
        self._handed_over = True
        self._attempts.let_go()
        self.abort(error)

    def follow(self, older: Serving) -> None:
        """`older`, of the same request, was handed over to this one. Before `deltas` begins."""
        for name, run in self._runs.items():
            if (before := older._runs.get(name)) is not None:
                run.follow(before)

    def on_output(self, duty: Role, worker: str, output: AttemptOutput) -> None:
        """Called by a link. Spans are kept even when the request has already ended."""
        if output.finish is not None:
            self._attempts.done(output.attempt)
            for span in output.finish.spans:
                self.timeline.add_span(worker, str(output.attempt), span)
            self._note_kv(duty, output.attempt, output.finish)
        if self._stopwatch.first_at is None and output.tokens:
            now = asyncio.get_running_loop().time()
            self.timeline.note_heard(output.attempt, output.tokens[0].index, now)
        self._inbox.put(Output(duty, worker, output))
        if len(self._inbox) > MAX_UNREAD * len(self._runs):
            self._give_up()

    def _note_kv(self, duty: Role, attempt: AttemptId, finish: Finish) -> None:
        record, run = self.timeline.attempts.get(attempt), self._runs[attempt.request_id]
        if record is not None and record.decision is not None:
            tokens = len(run.answer.prompt) + record.resumed_at
            self._parts.live.note_finish(record.decision, tokens, duty, finish)

    def on_lost(
        self, duty: Role, worker: str, attempt: AttemptId, stage: Stage, reason: str
    ) -> None:
        """Called by a link."""
        self._attempts.done(attempt)
        self._inbox.put(Lost(duty, worker, attempt, stage, reason))

    def _give_up(self) -> None:
        """The client does not keep up: stop the workers, and drop what it has not read. It hears of
        that when it reads on; that it reads at all is for its connection to find out."""
        self._inbox.clear()
        self._attempts.cancel_all("the client reads its answer too slowly")
        self.abort(Cancelled("the answer was dropped, because the client read it too slowly"))

    # -- beginning -----------------------------------------------------------------------------

    async def _adopt(self) -> None:
        """Take over what was begun before the client came back, as far as it is known and still
        there; the rest is made again."""
        record = await self._parts.records.find(self._request.key)
        reconnects = self._parts.metrics.reconnects
        places = record.answers if record is not None else ()
        await self._attempts.wait_for_links([place.decode for place in places])
        for place in places:
            run = self._runs.get(place.attempt.request_id)
            if run is None or run.phase is not Phase.NEW:
                continue
            self._due.remove(run)
            run.adopt(place.attempt)
            self.timeline.adopt_attempt(place, asyncio.get_running_loop().time())
            try:
                self._attempts.adopt(place)
            except WorkerLost as error:
                run.fail(error)
                self._pause(run)
            else:
                reconnects.add("adopted")
                self._note_place(place)
                self._arm_grace(run, PEER_GRACE_S)
        reconnects.add("again", len(self._due))

    def _note_place(self, place: AnswerPlace) -> None:
        """Tell other conductors where an answer is made."""
        self._places[place.attempt.request_id] = place
        left_s = self._request.deadline - asyncio.get_running_loop().time()
        self._note_places(left_s + LINGER_S)

    def _note_places(self, ttl_s: float) -> None:
        self._parts.records.note(self._request.key, tuple(self._places.values()), ttl_s)

    async def _begin_due(self) -> BatonError | None:
        """Begin the attempts whose time has come; return the error that ends the request."""
        try:
            while self._due:
                await self._begin(self._due.popleft())
        except BatonError as error:
            return error
        return None

    async def _begin(self, run: AnswerRun) -> None:
        """Route and start an attempt, or wait for a worker. Raises the error that ends the request:
        NoWorker, PoisonRequest, or Overloaded when the first attempt would miss an SLO."""
        keys = await self._attempts.hash_context(run)
        if self._handed_over:
            return
        self._tries[run.attempt.request_id].check(self._attempts.is_live)
        now = asyncio.get_running_loop().time()
        try:
            decision = self._attempts.decide(run, keys)
        except NoWorker as error:
            self._await_worker(run, error, now)
            return
        self._parts.metrics.route_seconds.observe(asyncio.get_running_loop().time() - now)
        self._check(run, decision)
        self._note_begin(run, decision, now)
        try:
            self._attempts.start(run, decision, keys, now)
        except WorkerLost as error:
            run.fail(error)
            self._pause(run)
        else:
            self._note_place(AnswerPlace(run.attempt, decision.decode.peer))

    def _await_worker(self, run: AnswerRun, error: NoWorker, now: float) -> None:
        """Look again in a moment, for as long as one may come back; else raise."""
        begun = run.error is not None or self._attempts.any_placed
        known = any(
            worker.info.role is Role.DECODE and worker.state is not WorkerState.DRAINING
            for worker in self._parts.fleet.view().workers
        )
        if not (begun or known) or not self._tries[run.attempt.request_id].may_wait(now):
            raise run.error or error  # what went wrong first says more
        self._arm(now + WORKER_POLL_S, Again(run.attempt))

    def _check(self, run: AnswerRun, decision: Decision) -> None:
        """Raises when the attempt should not begin."""
        if run.error is None and not self._attempts.any_placed and not self._request.sent:
            self._parts.admission.judge(decision)
            self.timeline.margins = self._parts.admission.margins
        if not isinstance(run.error, Overloaded) or run.num_tokens:
            return
        chosen = frozenset(peer.name for peer in peers(decision))
        if chosen == self._failed_at[run.attempt.request_id]:
            raise run.error  # nobody else is there to take it

    def _note_begin(self, run: AnswerRun, decision: Decision, now: float) -> None:
        metrics = self._parts.metrics
        metrics.note_decision(self._parts.placer.options.policy, decision.reason)
        if run.error is not None:
            metrics.note_retry(run.error.code)
            if run.num_tokens:
                metrics.resumes.inc()
        run.begin(split=decision.prefill is not None)
        sent = asyncio.get_running_loop().time()  # later than `now`: workers were chosen
        self.timeline.add_attempt(run.attempt, decision, run.num_tokens, sent)
        self._predictions.begin(run.answer.index, decision, now)

    # -- hearing -------------------------------------------------------------------------------

    def _absorb(self, events: list[Event], batch: list[Delta]) -> BatonError | None:
        """Append to `batch` what the events tell; return the error that ends the request."""
        now = asyncio.get_running_loop().time()
        try:
            for event in events:
                run = self._run_of(event)
                if run is None:
                    continue
                delta = self._apply(run, event)
                if delta is not None:
                    self._note_progress(run, delta, now)
                    batch.append(delta)
                self._follow_up(run)
        except BatonError as error:
            return error
        return None

    def _apply(self, run: AnswerRun, event: Event) -> Delta | None:
        if isinstance(event, Output):
            return run.on_output(event.duty, event.output)
        if isinstance(event, Lost):
            self._attempts.avoid(event.worker)
            return run.on_lost(event.duty, event.worker, event.reason)
        if isinstance(event, Late):
            return self._on_late(run, event)
        if isinstance(event, Again) and run.phase in (Phase.PAUSING, Phase.NEW):
            self._due.append(run)
        return None

    def _run_of(self, event: Event) -> AnswerRun | None:
        """The answer an event is about; None for events of attempts that were given up."""
        if isinstance(event, Abort):
            raise event.error
        attempt = event.output.attempt if isinstance(event, Output) else event.attempt
        run = self._runs[attempt.request_id]
        if isinstance(event, Lost):
            self._count_loss(run, event)
        return run if run.attempt == attempt else None

    def _count_loss(self, run: AnswerRun, lost: Lost) -> None:
        """Also of attempts that were given up: their other worker may have noticed first."""
        if run.is_complete or run.phase in (Phase.SETTLING, Phase.DONE):
            return
        stage = lost.stage
        current = run.attempt == lost.attempt
        if lost.duty is Role.DECODE and stage is Stage.QUEUED and current and run.handed_off:
            stage = Stage.COMPUTING
        self._tries[lost.attempt.request_id].on_loss(
            lost.attempt.number, lost.duty, stage, self._attempts.peer(lost.worker)
        )

    def _follow_up(self, run: AnswerRun) -> None:
        """What an answer's new phase asks for."""
        if run.phase is Phase.FAILED:
            self._pause(run)
        elif run.phase is Phase.SETTLING:
            self._attempts.cancel(run.attempt, "a stop string was found")
            self._arm_grace(run, SETTLE_GRACE_S)
        elif run.phase is Phase.DONE:
            self._open.discard(run.attempt.request_id)
            self._attempts.cancel(run.attempt, "the answer is complete")
            now = asyncio.get_running_loop().time()
            self.timeline.end_attempt(run.attempt, "complete", now)
        elif run.awaiting_peer:
            self._arm_grace(run, PEER_GRACE_S)

    def _pause(self, run: AnswerRun) -> None:
        """Give the failed attempt up, and plan another one. Raises the error that ends the
        request."""
        error = run.error or InternalError("an attempt failed without an error")
        name = run.attempt.request_id
        self._failed_at[name] = self._attempts.cancel(run.attempt, "the attempt failed")
        if not isinstance(error, WorkerMoved):  # whoever computed the prompt has it still
            self._attempts.avoid(*self._failed_at[name])
        now = asyncio.get_running_loop().time()
        self.timeline.end_attempt(run.attempt, f"{error.code}: {error.message}", now)
        pause_s = self._tries[name].after(error, run.progressed, now)
        run.phase = Phase.PAUSING
        if pause_s > 0:
            self._arm(now + pause_s, Again(run.attempt))
        else:
            self._due.append(run)

    def _on_late(self, run: AnswerRun, late: Late) -> Delta | None:
        if run.phase is late.phase:
            if run.phase is Phase.SETTLING:
                run.phase = Phase.DONE
            elif run.awaiting_peer:
                return run.fail_awaiting()
        return None

    def _arm_grace(self, run: AnswerRun, seconds: float) -> None:
        late = Late(run.attempt, run.phase)
        if late not in self._timers:
            self._arm(asyncio.get_running_loop().time() + seconds, late)

    def _arm(self, when: float, event: Event) -> None:
        loop = asyncio.get_running_loop()
        self._timers[event] = loop.call_at(when, self._ring, event)

    def _ring(self, event: Event) -> None:
        del self._timers[event]  # a request may look for a worker hundreds of times
        self._inbox.put(event)

    def _note_progress(self, run: AnswerRun, delta: Delta, now: float) -> None:
        self.timeline.output_tokens += len(delta.tokens)
        if delta.tokens and self._stopwatch.first_at is None:
            self.timeline.first_by = run.attempt
            span = self._parts.traces.span("first_token", self._request.received, now)
            self.timeline.add_span("conductor", "", span)
            self.timeline.ttft_s = now - self._request.received
        finished = delta.finish_reason is not None
        if delta.finish_reason is not None:
            self.timeline.finish_reasons.append(delta.finish_reason)
        self._predictions.note(delta.index, len(delta.tokens), finished, now)
        self._stopwatch.note(delta.index, len(delta.tokens), finished, now)
