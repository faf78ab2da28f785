"""One coroutine per request: start attempts, merge what workers say, end exactly once.

    route -> StartPrefill + StartDecode -> outputs -> deltas -> end
                 ^                            |
                 +---- another attempt -------+  a retryable error before the first token

Workers' messages and timers arrive in one inbox, so the coroutine has a single place where it
waits, and the timer of the deadline is always armed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from baton.errors import BatonError, DeadlineExceeded, InternalError, Overloaded
from baton.tokenizer import Tokenizer
from baton.types.fleet import Role
from baton.types.link import StartDecode, StartPrefill
from baton.types.request import AttemptId, AttemptOutput, GenerationTask
from conductor.admission import Admission
from conductor.answer_run import AnswerRun, Delta, Phase
from conductor.expected import ExpectedBlocks
from conductor.fleet import Fleet
from conductor.inbox import Abort, Event, Inbox, Late, Lost, Output
from conductor.link import Assignment
from conductor.metrics import Metrics, Stopwatch
from conductor.prompt_keys import prompt_keys
from conductor.request import Request
from conductor.router import Decision, RouteOptions, RouteRequest, group_of, route
from conductor.trace import Timeline, Traces

MAX_ATTEMPTS = 3
PEER_GRACE_S = 5.0  # how long the other worker may take to end an answer after its peer has gone
SETTLE_GRACE_S = 1.0  # how long the usage waits for the worker's last words after a stop string


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
    ) -> None:
        self.fleet = fleet
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.metrics = metrics
        self.traces = traces
        self.admission = admission
        self.routing = routing
        self.expected = ExpectedBlocks()
        self._decisions = 0

    def serve(self, request: Request) -> Serving:
        return Serving(self, request)

    def decide(self, request: Request, run: AnswerRun, keys: bytes, avoid: set[str]) -> Decision:
        """Where the next attempt at an answer goes. Raises NoWorker."""
        answer, prefix_map = run.answer, self.fleet.prefix_map
        self._decisions += 1
        asked = RouteRequest(
            key=run.attempt.request_id,
            prompt=answer.prompt,
            max_tokens=answer.sampling.max_tokens,
            avoid=frozenset(avoid),
            number=self._decisions,
            priority=request.priority,
            keys=keys,
            matches=prefix_map.matches(keys) if keys and prefix_map.num_blocks else (),
            computing=self.expected.blocks(group_of(keys), keys, request.priority),
        )
        now = asyncio.get_running_loop().time()
        return route(asked, self.fleet.view(), now, self.routing)


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
        self._open = set(self._runs)  # answers that have not ended
        self._keys: dict[int, bytes] = {}  # by prompt
        self._predicted: dict[int, tuple[float, Decision]] = {}  # by answer, when, and how
        self._placed: dict[AttemptId, Decision] = {}
        self._avoid: set[str] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._armed: set[Late] = set()
        self._stopwatch = Stopwatch(parts.metrics, request.received)
        self.timeline: Timeline = parts.traces.begin(request.id, request.model, request.received)
        self.timeline.prompt_tokens = request.prompt_tokens

    @property
    def usage(self) -> Usage:
        """Complete once `deltas` has ended; prompts with several answers count once."""
        first_of_prompt = {run.answer.prompt_index: run for run in reversed(self._runs.values())}
        return Usage(
            prompt_tokens=self._request.prompt_tokens,
            completion_tokens=sum(run.num_tokens for run in self._runs.values()),
            cached_tokens=sum(
                min(run.cached_tokens, len(run.answer.prompt)) for run in first_of_prompt.values()
            ),
        )

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """What becomes known, in order; ends when every answer has ended.

        Raises the error that ended the request. Closing the generator early cancels all attempts
        at all workers; nothing in its clean-up waits.
        """
        try:
            late = DeadlineExceeded("the request's deadline passed before it was answered")
            self._arm(self._request.deadline, Abort(late))
            await self._hash_prompts()
            for run in self._runs.values():
                self._begin(run, 0)
            while self._open:
                batch: list[Delta] = []
                error = self._absorb(await self._inbox.take(), batch)
                if batch:
                    yield batch
                if error is not None:
                    raise error
        finally:
            for timer in self._timers:
                timer.cancel()
            for attempt in list(self._placed):
                self._cancel(attempt, "the request has ended")
            self._stopwatch.end(asyncio.get_running_loop().time())

    def abort(self, error: BatonError) -> None:
        """End the request with `error`."""
        self._inbox.put(Abort(error))

    def on_output(self, duty: Role, worker: str, output: AttemptOutput) -> None:
        """Called by a link. Spans are kept even when the request has already ended."""
        if output.finish is not None:
            self._parts.expected.done(output.attempt)
            for span in output.finish.spans:
                self.timeline.add_span(worker, str(output.attempt), span)
        self._inbox.put(Output(duty, worker, output))

    def on_lost(self, duty: Role, worker: str, attempt: AttemptId, reason: str) -> None:
        """Called by a link."""
        self._parts.expected.done(attempt)
        self._inbox.put(Lost(duty, worker, attempt, reason))

    async def _hash_prompts(self) -> None:
        """Each prompt once, whatever the number of its answers and attempts."""
        fleet, salt = self._parts.fleet, self._request.cache_salt
        layout = fleet.layout()
        if layout is None:
            return
        for answer in self._request.answers:
            if answer.prompt_index not in self._keys:
                keys = await prompt_keys(answer.prompt, layout, salt, fleet.prefix_map)
                self._keys[answer.prompt_index] = keys

    def _begin(self, run: AnswerRun, number: int) -> None:
        """Route and start an attempt. Raises NoWorker, WorkerLost, or Overloaded when the first one
        would miss an SLO."""
        request, answer = self._request, run.answer
        now = asyncio.get_running_loop().time()
        keys = self._keys.get(answer.prompt_index, b"")
        decision = self._parts.decide(request, run, keys, self._avoid)
        if not self._placed and not number:
            self._parts.admission.judge(decision)
        self._parts.metrics.note_decision(self._parts.routing.policy, decision.reason)
        run.begin(number, split=decision.prefill is not None)
        task = GenerationTask(
            attempt=run.attempt,
            prompt=answer.prompt,
            sampling=answer.sampling,
            priority=request.priority,
            timeout_s=max(request.deadline - now, 0.0),
            cache_salt=request.cache_salt,
            cache_pin_s=request.cache_pin_s,
        )
        self.timeline.add_decision(run.attempt, decision)
        self._placed[run.attempt] = decision
        if not decision.is_guess:
            self._predicted[answer.index] = (now, decision)
        self._start(task, decision)
        worker = decision.prefill or decision.decode
        self._parts.expected.add(
            run.attempt, group_of(keys), keys, worker.info.name, request.priority
        )

    def _start(self, task: GenerationTask, decision: Decision) -> None:
        fleet, fetch = self._parts.fleet, decision.fetch_plan
        computing = Assignment(
            Role.DECODE if decision.prefill is None else Role.PREFILL,
            self,
            len(task.prompt),
            decision.work_s,
            task.priority,
            fetch,
        )
        if decision.prefill is None:
            start = StartDecode(task, fetch=fetch)
            fleet.start(decision.decode.peer, task.attempt, computing, start)
            return
        peer = decision.prefill.peer
        fleet.start(peer, task.attempt, computing, StartPrefill(task, fetch))
        duty = Assignment(Role.DECODE, self, 0)
        fleet.start(decision.decode.peer, task.attempt, duty, StartDecode(task, peer))

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
                    self._note_progress(delta, now)
                    batch.append(delta)
                self._follow_up(run)
        except BatonError as error:
            return error
        return None

    def _apply(self, run: AnswerRun, event: Event) -> Delta | None:
        if isinstance(event, Output):
            return run.on_output(event.duty, event.output)
        if isinstance(event, Lost):
            self._avoid.add(event.worker)
            run.on_lost(event.duty, event.worker, event.reason)
        elif isinstance(event, Late):
            self._on_late(run, event)
        return None

    def _run_of(self, event: Event) -> AnswerRun | None:
        """The answer an event is about; None for events of attempts that were given up."""
        if isinstance(event, Abort):
            raise event.error
        attempt = event.output.attempt if isinstance(event, Output) else event.attempt
        run = self._runs[attempt.request_id]
        return run if run.attempt == attempt else None

    def _follow_up(self, run: AnswerRun) -> None:
        """What an answer's new phase asks for."""
        if run.phase is Phase.FAILED:
            self._retry(run)
        elif run.phase is Phase.SETTLING:
            self._cancel(run.attempt, "a stop string was found")
            self._arm_grace(run, SETTLE_GRACE_S)
        elif run.phase is Phase.DONE:
            self._open.discard(run.attempt.request_id)
            self._cancel(run.attempt, "the answer is complete")
        elif run.awaiting_peer:
            self._arm_grace(run, PEER_GRACE_S)

    def _retry(self, run: AnswerRun) -> None:
        """Start another attempt, or raise the error that ended this one."""
        error = run.error or InternalError("an attempt failed without an error")
        failed = self._placed[run.attempt]
        self._cancel(run.attempt, "the attempt failed")
        number = run.attempt.number + 1
        if not error.retryable or run.num_tokens or number >= MAX_ATTEMPTS:
            raise error
        self._avoid.update(_names(failed))
        try:
            self._begin(run, number)
        except BatonError:
            raise error from None  # what went wrong first says more
        if isinstance(error, Overloaded) and _names(self._placed[run.attempt]) == _names(failed):
            raise error  # nobody else is there to take it
        self._parts.metrics.retries.inc()

    def _cancel(self, attempt: AttemptId, reason: str) -> None:
        decision = self._placed.pop(attempt, None)
        self._parts.expected.done(attempt)
        if decision is None:
            return
        for worker in (decision.prefill, decision.decode):
            if worker is not None:
                self._parts.fleet.cancel(worker.peer, attempt, reason)

    def _on_late(self, run: AnswerRun, late: Late) -> None:
        self._armed.discard(late)
        if run.phase is not late.phase:
            return
        if run.phase is Phase.SETTLING:
            run.phase = Phase.DONE
        elif run.awaiting_peer:
            run.fail_awaiting()

    def _arm_grace(self, run: AnswerRun, seconds: float) -> None:
        late = Late(run.attempt, run.phase)
        if late not in self._armed:
            self._armed.add(late)
            self._arm(asyncio.get_running_loop().time() + seconds, late)

    def _arm(self, when: float, event: Event) -> None:
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_at(when, self._inbox.put, event))

    def _note_progress(self, delta: Delta, now: float) -> None:
        self.timeline.output_tokens += len(delta.tokens)
        if delta.tokens and self._stopwatch.first_at is None:
            span = self._parts.traces.span("first_token", self._request.received, now)
            self.timeline.add_span("conductor", "", span)
        if self._predicted and delta.tokens and delta.index in self._predicted:
            decided_at, decision = self._predicted.pop(delta.index)
            self._parts.metrics.note_prediction(decision.ttft_s, now - decided_at)
            self._parts.fleet.note_ttft(decision.chosen.ttft_s, now - decided_at)
        self._stopwatch.note(delta.index, len(delta.tokens), delta.finish_reason is not None, now)


def _names(decision: Decision) -> frozenset[str]:
    workers = (decision.prefill, decision.decode)
    return frozenset(worker.info.name for worker in workers if worker is not None)
