"""Prometheus metrics of the conductor, all named `baton_*`. Times are in seconds."""

from __future__ import annotations

from prometheus_client import Counter

from baton import telemetry
from baton.errors import WorkerLost
from baton.types.fleet import Role
from baton.worker.certificate_metrics import CertificateEnds
from baton.worker.monitor import loop_lag
from conductor.admission import Slos
from conductor.fleet import Fleet
from conductor.fleet_metrics import FleetCollector
from conductor.goodput import Goodput, Latencies
from conductor.tenants.metrics import TenantMetrics

_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4, 10)
_ROUTING = (5e-5, 1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


MAX_OUTCOMES = 64  # codes of errors that are told apart: workers may send any
OTHER = "other"


class Metrics:
    """One registry per conductor, so that several can live in one process.

    Nothing that a client says becomes a label. Series that alerts watch are there from the start,
    so that the first event is seen as an increase.
    """

    def __init__(self, fleet: Fleet, slos: Slos | None = None) -> None:
        own = self._metrics = telemetry.Metrics()
        self._requests = own.counter(
            "baton_requests", "Requests by how they ended (ok, or an error code).", ["outcome"]
        )
        self._outcomes = {"ok"}
        self._requests.labels("ok")
        self.running = own.gauge("baton_requests_running", "Requests being worked on.")
        self.goodput = Goodput(own, slos or Slos())
        self.ttft = own.histogram("baton_ttft_seconds", "Time to the first token.", _LONG)
        self.tpot = own.histogram(
            "baton_tpot_seconds", "Time per output token after the first, by answer.", _SHORT
        )
        self.itl = own.distribution(
            "baton_itl_seconds", "Time between two deliveries of tokens of an answer.", _SHORT
        )
        self.e2e = own.histogram("baton_e2e_seconds", "Time from receipt to the end.", _LONG)
        self.prompt_tokens = own.counter("baton_prompt_tokens", "Prompt tokens received.")
        self.cached_tokens = own.counter(
            "baton_cached_prompt_tokens", "Prompt tokens whose KV was found in a cache."
        )
        self.output_tokens = own.tally("baton_output_tokens", "Tokens generated.")
        self.retries = own.counter(
            "baton_attempt_retries",
            "Attempts after the first one, by the error that ended the one before.",
            ["reason"],
        )
        self.retries.labels(WorkerLost.code)
        self.resumes = own.counter(
            "baton_resumes",
            "Migrations: attempts that went on behind tokens which the client had.",
        )
        self.reconnects = own.tallies(
            "baton_reconnects",
            "Answers that clients came back for: adopted where they are made, or made again.",
            "how",
            ("adopted", "again"),
        )
        self.retry_refusals = own.tallies(
            "baton_retry_refusals",
            "Failed requests that were not tried again: too many attempts (limit), too many "
            "failures in the cluster (budget).",
            "reason",
            ("limit", "budget"),
        )
        self.poison = own.counter(
            "baton_poison_requests", "Requests stopped because workers died while computing them."
        )
        self.decisions = own.counter(
            "baton_route_decisions",
            "Attempts by what decided where the prompt is computed.",
            ["policy", "reason"],
        )
        self._decisions: dict[tuple[str, str], Counter] = {}
        self.route_seconds = own.distribution(
            "baton_route_seconds",
            "Time to decide where an attempt goes, the search of the prefix map included.",
            _ROUTING,
        )
        self._rejections = own.counter(
            "baton_rejections",
            "Requests turned away because of the load: the bound (queue), or an SLO that would be "
            "missed (ttft, tpot).",
            ["reason"],
        )
        for reason in ("queue", "ttft", "tpot"):
            self._rejections.labels(reason)
        self.ttft_ratio = own.histogram(
            "baton_ttft_prediction_ratio",
            "Time from routing to the first token, by what was predicted for it.",
            _RATIOS,
        )
        self._role_changes = own.counter(
            "baton_role_changes", "Workers that were asked to take another role.", ["role"]
        )
        self._exports = own.tallies(
            "baton_trace_exports",
            "Traces of sampled requests: sent to the collector, failed there, or dropped because "
            "too many waited.",
            "outcome",
            ("sent", "failed", "dropped"),
        )
        for role in (Role.PREFILL, Role.DECODE):
            self._role_changes.labels(role.value)
        self.loop_lag = loop_lag(own)
        self.certificates = CertificateEnds(own)
        self.tenants = TenantMetrics(own)
        own.add_process("conductor")
        own.registry.register(FleetCollector(fleet))

    def note_outcome(self, code: str) -> None:
        """A request has ended: "ok", or the code of its error."""
        self._requests.labels(self._bounded(code)).inc()

    def note_retry(self, code: str) -> None:
        """An attempt follows one that ended with an error of that code."""
        self.retries.labels(self._bounded(code)).inc()

    def _bounded(self, code: str) -> str:
        if len(self._outcomes) < MAX_OUTCOMES:
            self._outcomes.add(code)
        return code if code in self._outcomes else OTHER

    def note_decision(self, policy: str, reason: str) -> None:
        counter = self._decisions.get((policy, reason))
        if counter is None:  # labels() takes longer than the rest
            counter = self._decisions[policy, reason] = self.decisions.labels(policy, reason)
        counter.inc()

    def note_rejection(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def note_retry_refusal(self, reason: str) -> None:
        if reason == "poison":
            self.poison.inc()
        else:
            self.retry_refusals.add(reason)

    def note_export(self, outcome: str, traces: int) -> None:
        self._exports.add(outcome, traces)

    def note_role_change(self, role: str) -> None:
        self._role_changes.labels(role).inc()

    def note_prediction(self, predicted_s: float, actual_s: float) -> None:
        if predicted_s > 0:
            self.ttft_ratio.observe(actual_s / predicted_s)

    def render(self) -> bytes:
        """The text exposition format."""
        return self._metrics.render()

    def snapshot(self) -> telemetry.Snapshot:
        """For a scraper."""
        return self._metrics.snapshot()


class Stopwatch:
    """Observes one request's latencies. All times are loop times. With a `trace_id`, the request
    can become the example of its bucket."""

    def __init__(self, metrics: Metrics, received: float, trace_id: str | None = None) -> None:
        self._metrics = metrics
        self._received = received
        self._answers: dict[int, tuple[float, float, int]] = {}  # first, last, tokens
        self.first_at: float | None = None
        self._worst_tpot_s: float | None = None
        self._exemplar = {"trace_id": trace_id} if trace_id else None

    @property
    def latencies(self) -> Latencies:
        ttft_s = None if self.first_at is None else self.first_at - self._received
        return Latencies(ttft_s, self._worst_tpot_s)

    def note(self, answer: int, tokens: int, finished: bool, now: float) -> None:
        """`tokens` more tokens of an answer have arrived."""
        metrics = self._metrics
        if self.first_at is None and tokens:
            self.first_at = now
            metrics.ttft.observe(now - self._received, self._exemplar)
        if tokens:
            first, last, count = self._answers.get(answer, (now, now, 0))
            if count:
                metrics.itl.observe(now - last)
            self._answers[answer] = (first, now, count + tokens)
            metrics.output_tokens.value += tokens
        if finished and answer in self._answers:
            first, last, count = self._answers[answer]
            if count > 1:
                tpot_s = (last - first) / (count - 1)
                metrics.tpot.observe(tpot_s, self._exemplar)
                self._worst_tpot_s = max(tpot_s, self._worst_tpot_s or 0.0)

    def end(self, now: float) -> None:
        self._metrics.e2e.observe(now - self._received, self._exemplar)
