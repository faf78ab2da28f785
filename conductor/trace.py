"""Timelines of the last requests: which workers served them, why, and where the time went."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from baton.types.link import FetchPart
from baton.types.registry import AnswerPlace
from baton.types.request import AttemptId, Span
from conductor.estimate import Candidate
from conductor.request import Tracing
from conductor.router import Decision

MAX_BYTES = 16 << 20  # of all timelines; a request may have hundreds of answers, each its attempts
# What parts of a timeline cost, about:
TIMELINE_BYTES = 1024
ATTEMPT_BYTES = 2048  # with two views of workers, which hardly any attempts share
ENTRY_BYTES = 192  # a candidate, a part of a fetch plan, a span


@dataclass(slots=True)
class AttemptRecord:
    """`resumed_at` is the number of answer tokens that the client had before it."""

    decision: Decision | None  # None: it was adopted
    resumed_at: int
    adopted_at: str = ""  # the worker that decodes it
    ended: str | None = None  # how: "complete", or an error's code and message


@dataclass(slots=True)
class Timeline:
    """One request's history; filled by dispatch, spans of workers may arrive after its end.
    `grown` is told of the bytes that it takes more."""

    request_id: str
    model: str
    received_s: float
    tracing: Tracing
    grown: Callable[[Timeline, int], None]
    nbytes: int = TIMELINE_BYTES  # about
    outcome: str = "running"
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt; known at the end
    error: str | None = None  # what the client was told
    margins: dict[str, float] = field(default_factory=dict)  # by SLO, when it was let in
    attempts: dict[AttemptId, AttemptRecord] = field(default_factory=dict)
    spans: list[tuple[str, str, Span]] = field(default_factory=list)

    def add_attempt(self, attempt: AttemptId, decision: Decision, resumed_at: int) -> None:
        self.attempts[attempt] = AttemptRecord(decision, resumed_at)
        entries = len(decision.candidates) + len(decision.fetch_plan)
        self._grow(ATTEMPT_BYTES + ENTRY_BYTES * entries)

    def adopt_attempt(self, place: AnswerPlace) -> None:
        self.attempts[place.attempt] = AttemptRecord(None, 0, adopted_at=place.decode.name)
        self._grow(ENTRY_BYTES)

    def end_attempt(self, attempt: AttemptId, how: str) -> None:
        record = self.attempts.get(attempt)
        if record is not None and record.ended is None:
            record.ended = how
            self._grow(len(how))

    def add_span(self, source: str, attempt: str, span: Span) -> None:
        self.spans.append((source, attempt, span))
        self._grow(ENTRY_BYTES)

    def _grow(self, nbytes: int) -> None:
        self.nbytes += nbytes
        self.grown(self, nbytes)

    def as_json(self) -> dict[str, Any]:
        spans = sorted(self.spans, key=lambda entry: entry[2].start_s)
        return {
            "request_id": self.request_id,
            "trace_id": self.tracing.context.trace_id,
            "model": self.model,
            "outcome": self.outcome,
            "received_s": self.received_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
            "error": self.error,
            "margins": self.margins,
            "attempts": [_attempt(attempt, record) for attempt, record in self.attempts.items()],
            "spans": [
                {
                    "source": source,
                    "attempt": attempt,
                    "name": span.name,
                    "start_s": span.start_s,
                    "end_s": span.end_s,
                }
                for source, attempt, span in spans
            ],
        }


def _attempt(attempt: AttemptId, record: AttemptRecord) -> dict[str, Any]:
    told = {
        "attempt": str(attempt),
        "resumed_at": record.resumed_at,
        "ended": record.ended,
    }
    if record.decision is None:
        reasons = ["another conductor began it, or an earlier connection"]
        return told | {"prefill": None, "decode": record.adopted_at, "reasons": reasons}
    return told | _decision(record.decision)


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "prefill": decision.prefill.info.name if decision.prefill else None,
        "decode": decision.decode.info.name,
        "reasons": list(decision.reasons),
        "candidates": [_candidate(candidate) for candidate in decision.candidates],
        "fetch": [_fetch(part) for part in decision.fetch_plan],
        "predicted_ttft_s": decision.ttft_s,
        "predicted_tpot_s": decision.tpot_s,
        "is_guess": decision.is_guess,
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {**asdict(candidate), "ttft_s": candidate.ttft_s}


def _fetch(part: FetchPart) -> dict[str, Any]:
    return {
        "source": part.source.name,
        "tier": part.tier.value,
        "first_block": part.first_block,
        "num_blocks": part.num_blocks,
    }


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

    def begin(self, request_id: str, model: str, received: float, tracing: Tracing) -> Timeline:
        timeline = Timeline(request_id, model, self.epoch_s + received, tracing, self._on_growth)
        if (before := self._timelines.pop(request_id, None)) is not None:
            self.nbytes -= before.nbytes
        self._timelines[request_id] = timeline
        self._on_growth(timeline, timeline.nbytes)
        return timeline

    def span(self, name: str, start: float, end: float) -> Span:
        """A span of this process; `start` and `end` are loop times."""
        return Span(name, self.epoch_s + start, self.epoch_s + end)

    def get(self, request_id: str) -> Timeline | None:
        return self._timelines.get(request_id)

    def _on_growth(self, timeline: Timeline, nbytes: int) -> None:
        if self._timelines.get(timeline.request_id) is not timeline:
            return  # it has gone already; only its request holds it
        self.nbytes += nbytes
        while len(self._timelines) > self._capacity or self.nbytes > self._max_bytes:
            _, oldest = self._timelines.popitem(last=False)
            self.nbytes -= oldest.nbytes
