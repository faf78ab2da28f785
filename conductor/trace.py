"""Timelines of the last requests: which workers served them, why, and where the time went."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

from baton.types.link import FetchPart
from baton.types.registry import AnswerPlace
from baton.types.request import AttemptId, Span
from conductor.estimate import Candidate
from conductor.router import Decision


@dataclass(slots=True)
class AttemptRecord:
    """`resumed_at` is the number of answer tokens that the client had before it."""

    decision: Decision | None  # None: it was adopted
    resumed_at: int
    adopted_at: str = ""  # the worker that decodes it
    ended: str | None = None  # how: "complete", or an error's code and message


@dataclass(slots=True)
class Timeline:
    """One request's history; filled by dispatch, spans of workers may arrive after its end."""

    request_id: str
    model: str
    received_s: float
    outcome: str = "running"
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # of the prompt; known at the end
    attempts: dict[AttemptId, AttemptRecord] = field(default_factory=dict)
    spans: list[tuple[str, str, Span]] = field(default_factory=list)

    def add_attempt(self, attempt: AttemptId, decision: Decision, resumed_at: int) -> None:
        self.attempts[attempt] = AttemptRecord(decision, resumed_at)

    def adopt_attempt(self, place: AnswerPlace) -> None:
        self.attempts[place.attempt] = AttemptRecord(None, 0, adopted_at=place.decode.name)

    def end_attempt(self, attempt: AttemptId, how: str) -> None:
        record = self.attempts.get(attempt)
        if record is not None and record.ended is None:
            record.ended = how

    def add_span(self, source: str, attempt: str, span: Span) -> None:
        self.spans.append((source, attempt, span))

    def as_json(self) -> dict[str, Any]:
        spans = sorted(self.spans, key=lambda entry: entry[2].start_s)
        return {
            "request_id": self.request_id,
            "model": self.model,
            "outcome": self.outcome,
            "received_s": self.received_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "cached_tokens": self.cached_tokens,
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
    """A ring: the oldest timeline goes when `capacity` is reached.

    `epoch_s` turns loop time into Unix seconds, which spans from other processes are in.
    """

    def __init__(self, loop_now: float, capacity: int = 1000) -> None:
        self._capacity = capacity
        self._timelines: OrderedDict[str, Timeline] = OrderedDict()
        self.epoch_s = time.time() - loop_now

    def begin(self, request_id: str, model: str, received: float) -> Timeline:
        timeline = Timeline(request_id, model, received_s=self.epoch_s + received)
        self._timelines.pop(request_id, None)
        self._timelines[request_id] = timeline
        if len(self._timelines) > self._capacity:
            self._timelines.popitem(last=False)
        return timeline

    def span(self, name: str, start: float, end: float) -> Span:
        """A span of this process; `start` and `end` are loop times."""
        return Span(name, self.epoch_s + start, self.epoch_s + end)

    def get(self, request_id: str) -> Timeline | None:
        return self._timelines.get(request_id)
