"""A timeline as `GET /trace/{id}` tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from baton.types.link import FetchPart
from baton.types.request import AttemptId
from conductor.attribution import Stage
from conductor.estimate import Candidate
from conductor.router import Decision
from conductor.trace import AttemptRecord, Timeline


def timeline_json(timeline: Timeline, now_s: float) -> dict[str, Any]:
    """`now_s` in Unix seconds: where the stages of a request end that has no token yet."""
    spans = sorted(timeline.spans, key=lambda entry: entry[2].start_s)
    return {
        "request_id": timeline.request_id,
        "trace_id": timeline.tracing.context.trace_id,
        "model": timeline.model,
        "outcome": timeline.outcome,
        "received_s": timeline.received_s,
        "ended_s": timeline.ended_s,
        "prompt_tokens": timeline.prompt_tokens,
        "output_tokens": timeline.output_tokens,
        "cached_tokens": timeline.cached_tokens,
        "error": timeline.error,
        "margins": timeline.margins,
        **_first_token(timeline, now_s),
        "attempts": [_attempt(attempt, record) for attempt, record in timeline.attempts.items()],
        "spans": [
            {
                "source": source,
                "attempt": attempt,
                "name": span.name,
                "start_s": span.start_s,
                "end_s": span.end_s,
                **dict(span.counts),
            }
            for source, attempt, span in spans
        ],
    }


def _first_token(timeline: Timeline, now_s: float) -> dict[str, Any]:
    """`ttft_s` is null until the first token was passed on; the stages are those so far."""
    stages = timeline.ttft_stages(now_s)
    came = timeline.passed_s is not None
    ttft_s = timeline.passed_s - timeline.received_s if timeline.passed_s is not None else None
    told = sum(stage.seconds for stage in stages)
    return {
        "ttft_s": ttft_s,
        "ttft_stages": _stages(stages),
        "ttft_attributed": min(told / ttft_s, 1.0) if ttft_s else None,
        "second_token_stages": _stages(timeline.behind_first()) if came else [],
    }


def _stages(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    return [
        {
            "name": stage.name,
            "start_s": stage.start_s,
            "end_s": stage.end_s,
            "seconds": stage.seconds,
        }
        for stage in stages
    ]


def _attempt(attempt: AttemptId, record: AttemptRecord) -> dict[str, Any]:
    told = {
        "attempt": str(attempt),
        "resumed_at": record.resumed_at,
        "sent_s": record.sent_s,
        "first_token_s": record.heard_s,
        "ended": record.ended,
        "ended_s": record.ended_s,
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
