"""Goodput: what was answered within the SLOs, which is what capacity is for (DistServe, OSDI'24).

A request counts when it ended well, its first token came within `--slo-ttft-ms` and each of its
answers took at most `--slo-tpot-ms` per token after the first. An SLO that is not set is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.telemetry import Metrics
from conductor.admission import Slos


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of one request. None: there was no token, or never a second one."""

    ttft_s: float | None = None
    worst_tpot_s: float | None = None


class Goodput:
    def __init__(self, metrics: Metrics, slos: Slos) -> None:
        self._slos = slos
        limits = {"ttft": slos.ttft_s, "tpot": slos.tpot_s}
        self._requests = metrics.tally(
            "baton_requests_within_slo",
            "Requests that ended well and kept every SLO that is set.",
        )
        self._tokens = metrics.tally(
            "baton_output_tokens_within_slo", "Tokens of these requests' answers."
        )
        self._misses = metrics.tallies(
            "baton_slo_misses", "Requests that ended well, but missed an SLO.", "slo", limits
        )
        told = metrics.gauge(
            "baton_slo_seconds", "The SLOs of --slo-ttft-ms and --slo-tpot-ms; 0: not set.", ["slo"]
        )
        for name, limit_s in limits.items():
            told.labels(name).set(limit_s or 0)

    def note(self, latencies: Latencies, tokens: int) -> None:
        """A request has ended well."""
        missed = missed_slos(latencies, self._slos)
        for name in missed:
            self._misses.add(name)
        if not missed:
            self._requests.value += 1
            self._tokens.value += tokens


def missed_slos(latencies: Latencies, slos: Slos) -> list[str]:
    """Those that a request which ended well did not keep."""
    late = _exceeds(latencies.ttft_s, slos.ttft_s)
    slow = _exceeds(latencies.worst_tpot_s, slos.tpot_s)
    return ["ttft"] * late + ["tpot"] * slow


def _exceeds(taken_s: float | None, limit_s: float | None) -> bool:
    return taken_s is not None and limit_s is not None and taken_s > limit_s
