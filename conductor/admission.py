"""The bounds on work in progress, kept before any work is spent on a request.

Two questions are asked: whether there is a place (a bound on the answers being worked on), and,
when the operator has set SLOs, whether the workers that were chosen are predicted to keep them
(early rejection, as in Mooncake, FAST'25). Only load is a reason to be turned away: a prompt that
could not keep the SLO on an idle worker either is served.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from baton.errors import InvalidRequest, NoWorker, Overloaded
from conductor.estimate import describe_s
from conductor.margin import Margin
from conductor.request import Request
from conductor.router import Decision
from conductor.views import WorkerView

SHORTEST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
_MEMORY = 0.9  # of the mean duration, per request
_LONG_MEMORY = 0.98  # of the share that is let in and of the mean TTFT, per request
_JITTER = (0.75, 1.25)


class TpotBy(StrEnum):
    """Which sequences count against the SLO of TPOT. A prompt that waits will decode only later:
    by then some of those that decode now have ended, and others have come before it."""

    ASSIGNED = "assigned"  # all that the worker was given, whether they decode yet or not
    NOW = "now"  # those that decode now
    PREDICTED = "predicted"  # those that will decode when the prompt has been computed


@dataclass(frozen=True, slots=True)
class Slos:
    """None = no promise. Seconds."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    tpot_by: TpotBy = TpotBy.ASSIGNED


class Admission:
    """Counts answers being worked on; `max_answers` is the bound.

    `on_reject` hears why a request was turned away: "queue", "ttft" or "tpot". `ttft` and `tpot`
    learn what came of predictions; None without an SLO. `seed` is of the jitter of Retry-After.
    """

    def __init__(
        self,
        max_answers: int,
        slos: Slos | None = None,
        on_reject: Callable[[str], None] = lambda _: None,
        seed: int | None = None,
    ) -> None:
        slos = slos or Slos()
        self.ttft = None if slos.ttft_s is None else Margin(slos.ttft_s)
        self.tpot = None if slos.tpot_s is None else Margin(slos.tpot_s)
        self._tpot_by = slos.tpot_by
        self._max_answers = max_answers
        self._on_reject = on_reject
        self._answers = 0
        self._mean_s = SHORTEST_RETRY_S  # of a request, from its place to its end
        self._mean_decode_s: float | None = None  # from its first token to its end
        self._mean_ttft_s: float | None = None  # predicted, of all that asked
        self._admitted = 1.0  # share of those that asked lately
        self._random = random.Random(seed)
        self._ids: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def margins(self) -> dict[str, float]:
        """What predictions are multiplied by at the moment, by SLO."""
        both = {"ttft": self.ttft, "tpot": self.tpot}
        return {name: margin.factor for name, margin in both.items() if margin is not None}

    def close(self) -> None:
        """Refuse new requests from now on."""
        self._closed = True

    async def wait_idle(self) -> None:
        """Return when nothing is being worked on; give it a deadline."""
        await self._idle.wait()

    def check_open(self) -> None:
        """Cheap check before a prompt is tokenized. Raises NoWorker or Overloaded."""
        if self._closed:
            raise NoWorker("this conductor is shutting down: send the request to another one")
        if self._answers >= self._max_answers:
            raise self._no_place()

    @contextmanager
    def admit(self, request: Request) -> Iterator[None]:
        """Hold a place for the request. Raises Overloaded, NoWorker, or InvalidRequest when its id
        is in use. A request with more answers than the bound is let in when nothing else runs."""
        self.check_open()
        answers = len(request.answers)
        if self._answers and self._answers + answers > self._max_answers:
            raise self._no_place()
        if request.id in self._ids and not request.sent:  # who comes back may be here still
            raise InvalidRequest(
                f"request_id {request.id!r} is in use by a running request", param="request_id"
            )
        self._ids[request.id] += 1
        self._answers += answers
        self._idle.clear()
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            self._mean_s += (1 - _MEMORY) * (loop.time() - began - self._mean_s)
            self._ids[request.id] -= 1
            if not self._ids[request.id]:
                del self._ids[request.id]
            self._answers -= answers
            if not self._answers:
                self._idle.set()

    def note_decode(self, seconds: float) -> None:
        """A request took that from its first token to its end."""
        mean_s = seconds if self._mean_decode_s is None else self._mean_decode_s
        self._mean_decode_s = mean_s + (1 - _MEMORY) * (seconds - mean_s)

    def judge(self, decision: Decision) -> None:
        """Raises Overloaded when the decision is predicted to miss an SLO because of the load, or
        so close to it that predictions like that have lately been missed.

        What is predicted counts the work of the same and of more urgent priority only. Guesses turn
        nobody away.
        """
        if not decision.is_guess:
            self._note_ttft(decision.ttft_s)
            now = asyncio.get_running_loop().time()
            if self.ttft is not None and decision.queue_s > 0:
                self.ttft.forget(now)
                self._judge_ttft(decision, self.ttft)
            if self.tpot is not None:
                self.tpot.forget(now)
                self._judge_tpot(decision, self.tpot)
        self._note(admitted=True)

    def _judge_ttft(self, decision: Decision, margin: Margin) -> None:
        late_s = margin.late_s(decision.ttft_s)
        if late_s > 0:
            # The queue becomes shorter by a second per second.
            raise self._reject(
                "ttft",
                f"the predicted time to the first token, {margin.describe(decision.ttft_s)} "
                f"({describe_s(decision.queue_s)} of it in the queue of {decision.chosen.worker})",
                min(late_s, decision.queue_s),
            )

    def _judge_tpot(self, decision: Decision, margin: Margin) -> None:
        worker, busy = decision.decode, self._sequences(decision)
        tpot_s = self.predicted_tpot_s(decision)
        if busy and margin.late_s(tpot_s) > 0:
            raise self._reject(
                "tpot",
                f"the predicted time per output token with {busy + 1} sequences on "
                f"{worker.info.name}, {margin.describe(tpot_s)}",
                self._until_fewer(worker, busy, margin.limit_s / margin.factor),
            )

    def predicted_tpot_s(self, decision: Decision) -> float:
        """With the sequences that count."""
        return decision.decode.cost.decode.seconds(self._sequences(decision) + 1)

    def _sequences(self, decision: Decision) -> int:
        """Those that the request would decode with. Of ages nothing is known, and they are taken as
        even (Mooncake's technical report, section 7.4, takes lengths so). The prediction is for the
        time in which a prompt is computed on average, not this one: else long prompts would be let
        in where short ones are not, by places that others are going to take before them."""
        worker = decision.decode
        if self._tpot_by is TpotBy.ASSIGNED:
            return worker.sequences
        foreign = worker.sequences - worker.own_attempts  # of other conductors
        decoding = worker.own_decoding + foreign
        if self._tpot_by is TpotBy.NOW:
            return decoding
        staying = 1.0  # nobody has ended yet
        if self._mean_decode_s is not None and self._mean_ttft_s is not None:
            staying = max(0.0, 1 - self._mean_ttft_s / max(self._mean_decode_s, 1e-9))
        return round(decoding * staying) + worker.own_attempts - worker.own_decoding

    def _note_ttft(self, seconds: float) -> None:
        mean_s = seconds if self._mean_ttft_s is None else self._mean_ttft_s
        self._mean_ttft_s = mean_s + (1 - _LONG_MEMORY) * (seconds - mean_s)

    def _until_fewer(self, worker: WorkerView, busy: int, tpot_s: float) -> float:
        """Seconds until enough sequences should have ended that another one keeps the SLO."""
        cost = worker.cost.decode
        excess = (cost.seconds(busy + 1) - tpot_s) / max(cost.sequence_s, 1e-9)
        return min(max(excess, 1.0), busy) / busy * self._mean_s

    def _no_place(self) -> Overloaded:
        # By Little's law a place comes free every mean duration / places.
        return self._reject(
            "queue",
            f"{self._answers} answers are being worked on, the bound is {self._max_answers}",
            self._mean_s / max(self._answers, 1),
        )

    def _reject(self, reason: str, why: str, drain_s: float) -> Overloaded:
        """`drain_s`: until one request more can be let in. Others wait for that, too: when one of
        ten that ask is let in, it takes ten times as long until it is this one's turn. Jittered, so
        that those who were turned away together do not come back together."""
        self._on_reject(reason)
        self._note(admitted=False)
        turn_s = max(drain_s, SHORTEST_RETRY_S) / self._admitted * self._random.uniform(*_JITTER)
        retry_s = min(max(turn_s, SHORTEST_RETRY_S), LONGEST_RETRY_S)
        return Overloaded(f"{why}: try again in {math.ceil(retry_s)} s", retry_after_s=retry_s)

    def _note(self, admitted: bool) -> None:
        self._admitted += (1 - _LONG_MEMORY) * (admitted - self._admitted)
