"""What was predicted of a request's answers, until it is known what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from conductor.admission import Admission
from conductor.fleet import Fleet
from conductor.metrics import Metrics
from conductor.router import Decision


@dataclass(slots=True)
class _Open:
    decided_at: float
    decision: Decision
    tpot_s: float
    first_at: float = 0.0
    tokens: int = 0


class Predictions:
    """Of one request. Times are the loop's."""

    def __init__(self, fleet: Fleet, metrics: Metrics, admission: Admission) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._admission = admission
        self._open: dict[int, _Open] = {}  # by answer

    def begin(self, answer: int, decision: Decision, now: float) -> None:
        """An attempt at the answer begins; guesses are not compared with anything."""
        self._open.pop(answer, None)
        if not decision.is_guess:
            self._open[answer] = _Open(now, decision, self._admission.predicted_tpot_s(decision))

    def note(self, answer: int, tokens: int, finished: bool, now: float) -> None:
        """`tokens` more tokens of the answer have come."""
        held = self._open.get(answer)
        if held is None:
            return
        if tokens and not held.tokens:
            held.first_at = now
            self._note_first(held.decision, now - held.decided_at, now)
        held.tokens += tokens
        if finished:
            del self._open[answer]
            if held.tokens > 1:
                self._note_all(held, (now - held.first_at) / (held.tokens - 1), now)

    def _note_first(self, decision: Decision, actual_s: float, now: float) -> None:
        self._metrics.note_prediction(decision.ttft_s, actual_s)
        self._fleet.note_ttft(decision.chosen.ttft_s, actual_s)
        if (margin := self._admission.ttft) is not None:
            margin.add(decision.ttft_s, actual_s, now)

    def _note_all(self, held: _Open, actual_s: float, now: float) -> None:
        """The prediction was for the sequences there were; others may have come since, which were
        let in because it would be no slower than is predicted now."""
        if (margin := self._admission.tpot) is not None:
            worker = self._fleet.look_at(held.decision.decode.info.name)
            now_s = worker.tpot_s if worker is not None else 0.0
            margin.add(max(held.tpot_s, now_s), actual_s, now)
