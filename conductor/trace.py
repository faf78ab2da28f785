"""Timelines of the last requests: which workers served them, why, and where the time went.

`trace_json` is how they are told; `attribution` splits the time to the first token.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from baton.types.registry import AnswerPlace
from baton.types.request import AttemptId, Span
from conductor.attribution import FirstToken, Stage, behind_first, ttft_stages
from conductor.request import Request, Tracing
from conductor.router import Decision

MAX_BYTES = 16 << 20  # of all timelines; a request may have hundreds of answers, each its attempts
# What parts of a timeline cost, about:
TIMELINE_BYTES = 1024
ATTEMPT_BYTES = 2048  # with two views of workers, which hardly any attempts share
ENTRY_BYTES = 192  # a candidate, a part of a fetch plan, a span


@dataclass(slots=True)
class AttemptRecord:
    """`resumed_at` is the number of answer tokens that the client had before it. Unix seconds."""

    decision: Decision | None  # None: it was adopted
    resumed_at: int
    sent_s: float  # to its workers
    heard_s: float | None = None  # its first token
    adopted_at: str = ""  # the worker that decodes it
    ended: str | None = None  # how: "complete", or an error's code and message
    ended_s: float | None = None

    @property
    def computes(self) -> str:
        """The worker that computes the prompt, or has computed it."""
        if self.decision is None:
            return self.adopted_at
        return (self.decision.prefill or self.decision.decode).info.name


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asked for, of which traces tell: nothing that it wrote."""

    max_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    answers: int = 0

    @classmethod
    def of(cls, request: Request) -> Asked:
        if not request.answers:
            return cls()
        sampling = request.answers[0].sampling
        answers = len(request.answers)
        return cls(sampling.max_tokens, sampling.temperature, sampling.top_p, answers)


@dataclass(slots=True)
class Timeline:
    """One request's history; filled by dispatch, spans of workers may arrive after its end.
    `grown` is told of the bytes that it takes more. Times are Unix seconds, except where a method
    takes the loop's, which `epoch_s` is the difference to."""

    request_id: str
    model: str
    operation: str
    received_s: float
    epoch_s: float
    tracing: Tracing
    asked: Asked
    grown: Callable[[Timeline, int], None]
    nbytes: int = TIMELINE_BYTES  # about
    tenant: str = ""  # who may see it
    outcome: str = "running"
    ended_s: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt; known at the end
    ttft_s: float | None = None
    tpot_s: float | None = None  # of the slowest answer; known at the end
    error: str | None = None  # what the client was told
    margins: dict[str, float] = field(default_factory=dict)  # by SLO, when it was let in
    attempts: dict[AttemptId, AttemptRecord] = field(default_factory=dict)
    spans: list[tuple[str, str, Span]] = field(default_factory=list)
    first_by: AttemptId | None = None  # which attempt brought the first token
    finish_reasons: list[str] = field(default_factory=list)  # of the answers that have ended
    passed_s: float | None = None  # when that was handed to the client's connection

    def add_attempt(
        self, attempt: AttemptId, decision: Decision, resumed_at: int, now: float
    ) -> None:
        self.attempts[attempt] = AttemptRecord(decision, resumed_at, self.epoch_s + now)
        entries = len(decision.candidates) + len(decision.fetch_plan)
        self._grow(ATTEMPT_BYTES + ENTRY_BYTES * entries)

    def adopt_attempt(self, place: AnswerPlace, now: float) -> None:
        sent_s = self.epoch_s + now
        self.attempts[place.attempt] = AttemptRecord(None, 0, sent_s, adopted_at=place.decode.name)
        self._grow(ENTRY_BYTES)

    def note_heard(self, attempt: AttemptId, index: int, now: float) -> None:
        """A worker has sent a token with that index, before any was passed on."""
        record = self.attempts.get(attempt)
        if record is not None and record.heard_s is None and index <= record.resumed_at:
            record.heard_s = self.epoch_s + now

    def note_passed(self, now: float) -> None:
        """The first token is the connection's."""
        self.passed_s = self.epoch_s + now

    def end_attempt(self, attempt: AttemptId, how: str, now: float) -> None:
        record = self.attempts.get(attempt)
        if record is not None and record.ended is None:
            record.ended = how
            record.ended_s = self.epoch_s + now
            self._grow(len(how))

    def end(self, outcome: str, now: float) -> None:
        self.outcome = outcome
        self.ended_s = self.epoch_s + now
        self.add_span("conductor", "", Span("request", self.received_s, self.ended_s))

    def add_span(self, source: str, attempt: str, span: Span) -> None:
        self.spans.append((source, attempt, span))
        self._grow(ENTRY_BYTES)

    def ttft_stages(self, now_s: float) -> tuple[Stage, ...]:
        """Where the time to the first token went, or until now, while it has not come."""
        tracing, attempts = self.tracing, list(self.attempts.items())
        first = attempts[0][1] if attempts else None
        attempt, record = self._first_attempt()
        known = FirstToken(
            received_s=self.received_s,
            read_s=self.epoch_s + tracing.read_at,
            tokenized_s=self.epoch_s + tracing.tokenized_at,
            first_sent_s=first.sent_s if first is not None else None,
            sent_s=record.sent_s if record is not None else None,
            adopted=record is not None and record.decision is None,
            heard_s=record.heard_s if record is not None else None,
            passed_s=self.passed_s,
            spans=self._spans_of(attempt, record.computes) if record is not None else (),
        )
        return ttft_stages(known, now_s if self.ended_s is None else self.ended_s)

    def behind_first(self) -> tuple[Stage, ...]:
        """What the second token waited for."""
        attempt, record = self._first_attempt()
        if record is None or record.heard_s is None:
            return ()
        spans = {span.name: span for _, name, span in self.spans if name == str(attempt)}
        return behind_first(spans, (record.heard_s, self.ended_s or float("inf")))

    def _first_attempt(self) -> tuple[AttemptId | None, AttemptRecord | None]:
        """That brought the first token; the last one while there is none."""
        attempt = self.first_by or next(reversed(self.attempts), None)
        return attempt, self.attempts[attempt] if attempt is not None else None

    def _spans_of(self, attempt: AttemptId | None, worker: str) -> list[Span]:
        return [s for source, name, s in self.spans if (source, name) == (worker, str(attempt))]

    def _grow(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self.grown(self, nbytes)


class Traces:
    """A ring: the oldest timelines go when there are more than `capacity`, or `max_bytes` of them.

    `epoch_s` turns loop time into Unix seconds, which spans from other processes are in.
    """

    def __init__(self, loop_now: float, capacity: int = 1000, max_bytes: int = MAX_BYTES) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._timelines: OrderedDict[str, Timeline] = OrderedDict()
        self.nbytes = 0  # about, of those that are kept
        self.epoch_s = time.time() - loop_now

    def __len__(self) -> int:
        return len(self._timelines)

    def begin(self, request: Request) -> Timeline:
        timeline = Timeline(
            request.id,
            request.model,
            request.operation,
            self.epoch_s + request.received,
            self.epoch_s,
            request.tracing,
            Asked.of(request),
            self._on_growth,
            tenant=request.tenant.name,
            prompt_tokens=request.prompt_tokens,
        )
        if (before := self._timelines.pop(request.id, None)) is not None:
            self.nbytes -= before.nbytes
        self._timelines[request.id] = timeline
        self._on_growth(timeline, timeline.nbytes)
        return timeline

    def span(self, name: str, start: float, end: float) -> Span:
        """A span of this process; `start` and `end` are loop times."""
        return Span(name, self.epoch_s + start, self.epoch_s + end)

    def recent(self, count: int) -> list[Timeline]:
        """The last ones that began, the newest first."""
        return list(islice(reversed(self._timelines.values()), count))

    def get(self, request_id: str) -> Timeline | None:
        return self._timelines.get(request_id)

    def _on_growth(self, timeline: Timeline, nbytes: int) -> None:
        if self._timelines.get(timeline.request_id) is not timeline:
            return  # it has gone already; only its request holds it
        self.nbytes += nbytes
        while len(self._timelines) > self._capacity or self.nbytes > self._max_bytes:
            _, oldest = self._timelines.popitem(last=False)
            self.nbytes -= oldest.nbytes
