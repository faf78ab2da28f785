"""What the two sides of handoffs count, for `/metrics`."""

from __future__ import annotations

import asyncio
from enum import StrEnum

from baton.counts import Counts
from baton.errors import DeadlineExceeded, LeaseExpired
from baton.kv.handoff.leases import Ending

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Outcome(StrEnum):
    """Of taking over, at the decode side."""

    DONE = "done"
    NOT_NEEDED = "not_needed"  # the first token ended the answer
    EXPIRED = "expired"  # the lease ended first
    LATE = "late"  # the request's deadline passed
    CANCELLED = "cancelled"
    FAILED = "failed"


class HandoffFigures:
    """Of one process, which may be either side, or one after the other."""

    def __init__(self, metrics: Counts) -> None:
        self.taken = metrics.tallies(
            "baton_handoffs",
            "Attempts at taking KV over from a prefill worker, by outcome.",
            "outcome",
            Outcome,
        )
        self.seconds = metrics.distribution(
            "baton_handoff_seconds",
            "Time from the first published KV to its release, prefill of what follows included.",
            _SECONDS,
        )
        self.exposed = metrics.distribution(
            "baton_handoff_exposed_seconds",
            "Time that reading KV went on after its prefill had ended: what overlap did not hide.",
            _SECONDS,
        )
        self.bytes = metrics.tally("baton_handoff_bytes", "KV that was read from prefill workers.")
        self.leases = metrics.tallies(
            "baton_handoff_leases_ended",
            "Leases of published KV at the prefill side, by how they ended.",
            "how",
            Ending,
        )

    def note_taken(self, seconds: float, exposed_s: float, nbytes: int) -> None:
        self.taken.add(Outcome.DONE)
        self.seconds.observe(seconds)
        self.exposed.observe(exposed_s)
        self.bytes.value += nbytes

    def note_failure(self, error: BaseException) -> None:
        self.taken.add(_outcome(error))


def _outcome(error: BaseException) -> Outcome:
    if isinstance(error, asyncio.CancelledError):
        return Outcome.CANCELLED
    if isinstance(error, LeaseExpired):
        return Outcome.EXPIRED
    if isinstance(error, DeadlineExceeded):
        return Outcome.LATE
    code = getattr(error, "code", "")
    return Outcome.NOT_NEEDED if code == "finished" else Outcome.FAILED
