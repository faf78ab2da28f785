"""Prometheus metrics of the conductor, all named `baton_*`. Times are in seconds."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from baton import telemetry
from conductor.fleet import Fleet
from conductor.store_metrics import StoreCollector

_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATIOS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4, 10)
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)


class Metrics:
    """One registry per conductor, so that several can live in one process."""

    def __init__(self, fleet: Fleet) -> None:
        own = self._metrics = telemetry.Metrics()
        self.requests = own.counter(
            "baton_requests", "Requests by how they ended (ok, or an error code).", ["outcome"]
        )
        self.running = own.gauge("baton_requests_running", "Requests being worked on.")
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
        self.resumes = own.counter(
            "baton_resumes", "Attempts that went on behind tokens which the client had."
        )
        self.reconnects = own.counter(
            "baton_reconnects",
            "Answers that clients came back for: adopted where they are made, or made again.",
            ["how"],
        )
        self.retry_refusals = own.counter(
            "baton_retry_refusals",
            "Failed requests that were not tried again: too many attempts (limit), too many "
            "failures in the cluster (budget).",
            ["reason"],
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
        self.rejections = own.counter(
            "baton_rejections",
            "Requests turned away because of the load: the bound (queue), or an SLO that would be "
            "missed (ttft, tpot).",
            ["reason"],
        )
        self.ttft_ratio = own.histogram(
            "baton_ttft_prediction_ratio",
            "Time from routing to the first token, by what was predicted for it.",
            _RATIOS,
        )
        self.role_changes = own.counter(
            "baton_role_changes", "Workers that were asked to take another role.", ["role"]
        )
        own.registry.register(_FleetCollector(fleet))
        own.registry.register(StoreCollector(fleet))

    def note_decision(self, policy: str, reason: str) -> None:
        counter = self._decisions.get((policy, reason))
        if counter is None:  # labels() takes longer than the rest
            counter = self._decisions[policy, reason] = self.decisions.labels(policy, reason)
        counter.inc()

    def note_rejection(self, reason: str) -> None:
        self.rejections.labels(reason).inc()

    def note_retry_refusal(self, reason: str) -> None:
        if reason == "poison":
            self.poison.inc()
        else:
            self.retry_refusals.labels(reason).inc()

    def note_role_change(self, role: str) -> None:
        self.role_changes.labels(role).inc()

    def note_prediction(self, predicted_s: float, actual_s: float) -> None:
        if predicted_s > 0:
            self.ttft_ratio.observe(actual_s / predicted_s)

    def render(self) -> bytes:
        """The text exposition format."""
        return self._metrics.render()


class Stopwatch:
    """Observes one request's latencies. All times are loop times."""

    def __init__(self, metrics: Metrics, received: float) -> None:
        self._metrics = metrics
        self._received = received
        self._answers: dict[int, tuple[float, float, int]] = {}  # first, last, tokens
        self.first_at: float | None = None

    def note(self, answer: int, tokens: int, finished: bool, now: float) -> None:
        """`tokens` more tokens of an answer have arrived."""
        metrics = self._metrics
        if self.first_at is None and tokens:
            self.first_at = now
            metrics.ttft.observe(now - self._received)
        if tokens:
            first, last, count = self._answers.get(answer, (now, now, 0))
            if count:
                metrics.itl.observe(now - last)
            self._answers[answer] = (first, now, count + tokens)
            metrics.output_tokens.value += tokens
        if finished and answer in self._answers:
            first, last, count = self._answers[answer]
            if count > 1:
                metrics.tpot.observe((last - first) / (count - 1))

    @property
    def tpot_s(self) -> float | None:
        """Of the slowest answer so far."""
        answers = [(last - first, count - 1) for first, last, count in self._answers.values()]
        return max((seconds / gaps for seconds, gaps in answers if gaps > 0), default=None)

    def end(self, now: float) -> None:
        self._metrics.e2e.observe(now - self._received)


class _FleetCollector(Collector):
    """Reads the fleet when it is scraped."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[GaugeMetricFamily]:
        workers = GaugeMetricFamily(
            "baton_workers", "Workers by role and state.", labels=["role", "state"]
        )
        blocks = GaugeMetricFamily(
            "baton_worker_blocks", "KV blocks by worker and state.", labels=["worker", "state"]
        )
        sequences = GaugeMetricFamily(
            "baton_worker_sequences",
            "Sequences in workers, running or waiting.",
            labels=["worker", "state"],
        )
        views = self._fleet.view().workers
        tally = Tally((view.info.role.value, view.state.value) for view in views)
        for (role, state), count in tally.items():
            workers.add_metric([role, state], count)
        for view in views:
            name = view.info.name
            sequences.add_metric([name, "running"], view.load.running)
            sequences.add_metric([name, "waiting"], view.load.waiting)
            for block_state, count in view.load.blocks:
                blocks.add_metric([name, block_state.value], count)
        return workers, blocks, sequences, *self._prefix_map()

    def _prefix_map(self) -> Iterable[GaugeMetricFamily]:
        known = self._fleet.prefix_map
        values = {
            "baton_prefix_map_blocks": ("KV blocks whose holders are known.", known.num_blocks),
            "baton_prefix_map_bytes": ("Memory of the prefix map.", known.memory_bytes),
        }
        for name, (help_text, value) in values.items():
            yield GaugeMetricFamily(name, help_text, value=value)
