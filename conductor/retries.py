"""When a failed attempt is followed by another one, and when that would do harm.

    an attempt fails -> too many in a row? -> the error
                     -> budget is spent?   -> Overloaded
                     -> otherwise another one: the first at once, later ones after growing pauses

Two things are guarded against. A retry storm: when much fails at once, retries would be the load
that keeps it failing, so a budget bounds them by the number of requests (as in Finagle's
RetryBudget). And poison: a request that kills the workers that compute for it would go through the
fleet one by one, so it is stopped when a second one has died (and not merely lost its link).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import BatonError, Overloaded, PoisonRequest, WorkerMoved
from baton.types.fleet import Peer, Role
from conductor.link import Stage


@dataclass(frozen=True, slots=True)
class RetryOptions:
    """`seed` of the pauses' jitter; None: another one in every process. Times in seconds."""

    failures: int = 6  # in a row until the request fails; tokens begin the count anew
    deaths: int = 2  # of workers that computed for a request, until it counts as poison
    verdict_s: float = 1.0  # after which a worker that only lost its link should have a new one
    first_pause_s: float = 0.1
    last_pause_s: float = 2.0
    worker_wait_s: float = 30.0  # how long a request waits for a worker that may be restarted
    share: float = 0.1  # retries per request, in the long run
    per_s: float = 10.0  # retries that are allowed even when few requests come
    burst: int = 1024  # so that everything a dead worker had can be resumed
    seed: int | None = None


class RetryBudget:
    """A token bucket, filled by requests and, slowly, by time. `now` is in seconds, never less
    than before."""

    def __init__(self, options: RetryOptions, now: float) -> None:
        self._options = options
        self._tokens = float(options.burst)
        self._at = now

    def deposit(self) -> None:
        """A request has come."""
        self._add(self._options.share)

    def withdraw(self, now: float) -> bool:
        """Whether one more retry may be made; it is counted."""
        self._add((now - self._at) * self._options.per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _add(self, tokens: float) -> None:
        self._tokens = min(self._tokens + tokens, float(self._options.burst))


class Retries:
    """Of one conductor. `on_refuse` hears why a request was not tried again: "limit", "budget" or
    "poison"."""

    def __init__(
        self,
        options: RetryOptions,
        now: float,
        on_refuse: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.options = options
        self.on_refuse = on_refuse
        self.budget = RetryBudget(options, now)
        self._random = random.Random(options.seed)

    def pause_s(self, failures: int) -> float:
        """Before the attempt after so many failures: none after the first, because another worker
        may be well; then longer and longer, jittered, so that many do not come back together."""
        if failures < 2:
            return 0.0
        options = self.options
        full = min(options.first_pause_s * 2.0 ** (failures - 2), options.last_pause_s)
        return full * self._random.uniform(0.5, 1.0)


class Tries:
    """At one answer of the request `request_id`: what came of its attempts so far."""

    def __init__(self, retries: Retries, request_id: str) -> None:
        self._retries = retries
        self._request_id = request_id
        self._failures = 0
        self._lost: list[Peer] = []  # in a row, while they computed for it
        self._lost_duty: Role | None = None
        self._lost_in: int | None = None  # the attempt of the last loss
        self._waits_until: float | None = None

    def on_loss(self, number: int, duty: Role, stage: Stage, worker: Peer) -> None:
        """The link to a worker of attempt `number` broke.

        Only a worker that was computing for the request can have died of it, and what went well at
        another worker is not what kills: when tokens came, or the prompt was computed, the count
        begins anew. An attempt counts once: workers that go together have died of something else.
        """
        if stage is Stage.QUEUED or number == self._lost_in:
            return
        self._lost_in = number
        if stage is Stage.ANSWERING or duty is not self._lost_duty:
            self._lost.clear()
        self._lost_duty = duty
        if worker not in self._lost:  # a life is lost once
            self._lost.append(worker)

    def check(self, is_live: Callable[[Peer], bool]) -> None:
        """Before another attempt. Raises PoisonRequest when too many of the lost workers have died:
        whoever has a link again had only lost it."""
        if len(self._lost) < self._retries.options.deaths:
            return
        self._lost = [worker for worker in self._lost if not is_live(worker)]
        if len(self._lost) >= self._retries.options.deaths:
            self._retries.on_refuse("poison")
            names = ", ".join(worker.name for worker in self._lost)
            raise PoisonRequest(
                f"request {self._request_id} was stopped: workers died one after the other while "
                f"they computed for it ({names})"
            )

    def after(self, error: BatonError, brought_tokens: bool, now: float) -> float:
        """The pause in seconds before the next attempt. Raises the error that ends the request."""
        retries = self._retries
        if isinstance(error, WorkerMoved):  # planned, and no failure of anybody
            return 0.0
        self._failures = 1 if brought_tokens else self._failures + 1
        self._waits_until = None
        if not error.retryable:
            raise error
        if self._failures >= retries.options.failures:
            retries.on_refuse("limit")
            raise error
        if not retries.budget.withdraw(now):
            retries.on_refuse("budget")
            raise Overloaded(
                f"too many attempts are failing, so this one is not repeated: {error.message}"
            ) from error
        pause_s = retries.pause_s(self._failures)
        if len(self._lost) >= retries.options.deaths:
            pause_s = max(pause_s, retries.options.verdict_s)
        return pause_s

    def may_wait(self, now: float) -> bool:
        """Whether to wait (further) for a worker that can take the next attempt."""
        if self._waits_until is None:
            self._waits_until = now + self._retries.options.worker_wait_s
        return now < self._waits_until
