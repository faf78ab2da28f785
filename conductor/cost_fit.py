"""Fits the costs of `conductor.cost_model` to what workers report, as they report it.

Nothing here reads a clock: samples carry their durations. Coefficients are never negative and never
NaN; what was not measured for long returns to a prior in proportion to what was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.types.fleet import WorkerInfo
from baton.types.kv_events import Tier
from baton.types.request import Span
from conductor.cost_model import (
    HANDOFF_PRIOR,
    MIN_SAMPLES,
    TRANSFER_PRIORS,
    UNKNOWN_WORKER,
    DecodeCost,
    PrefillCost,
    Route,
    TransferCost,
    TransferCosts,
    WorkerCost,
    pairs,
)

_SHORTEST_S = 1e-6  # clocks tell no less apart
_LONGEST_S = 3600.0
_LARGEST = 1e15  # of a feature: bytes, pairs of tokens
_SCALES = 1e6  # how far from the prior a cost may be
_MEMORY = 0.95  # what a sample weighs after one more: about twenty samples count
_PRIOR_WEIGHT = 0.02  # of the prior, against one sample
_TIE_WEIGHT = 0.15  # of the prior's proportion between two coefficients
_TIED_LEAST = 0.4  # of the first: what the second counts as when it is less
_OUTLIER = 8.0  # a sample counts as no more than so many times what was expected
_SCALE_MEMORY = 0.8
_FIRST_SWEEPS = 40  # of coordinate descent, from the prior
_SWEEPS = 8  # from the last solution
_SETTLED = 32  # samples, after which the last solution is where to begin
_STILL = 1e-4  # of the scale: a sweep that moves no coefficient further is the last
_FRESH = 8  # samples, within which the last solution does to tell outliers
_TTFT_STEP = 0.05  # of the way to what the last estimate should have been multiplied by
_TTFT_FACTORS = 10.0  # more, or less than its inverse, is an accident
_SAME_STEP_S = 1e-4  # prompts that were computed so shortly after one another ended with one step
SAMPLE_PAUSE_S = 0.05  # at hundreds of prompts per second, all of them say the same


class NonNegativeFit:
    """Least squares of relative errors over `seconds ≈ Σ coefficient·feature`, none negative.

    Ridge regression towards the prior, which is scaled by the ratio of measured to predicted times,
    so that features that were never seen stay in proportion; old samples fade. `tied`: two
    whose proportion the prior knows, so that noise and what the model leaves out do not take all of
    the second one while samples tell of the first only.
    """

    def __init__(self, prior: tuple[float, ...], tied: tuple[int, int] | None = None) -> None:
        self._prior = prior
        self._tied = tied
        size = len(prior)
        self._products = [[0.0] * size for _ in prior]  # in units of the prior
        self._targets = [0.0] * size
        self._log_scale = 0.0
        self._factors = [1.0] * size
        self._solution = prior
        self._unsolved = 0  # samples that the solution lacks
        self.samples = 0

    def add(self, features: tuple[float, ...], seconds: float) -> None:
        """Take a sample; one that cannot be true (not finite, negative, an hour) is ignored."""
        if not (0.0 <= seconds < _LONGEST_S and all(0.0 <= x < _LARGEST for x in features)):
            return
        seconds = max(seconds, _SHORTEST_S)
        if self.samples >= MIN_SAMPLES:
            known = self._solution if self._unsolved < _FRESH else self.solve()
            seconds = min(seconds, _OUTLIER * max(_dot(known, features), _SHORTEST_S))
        scaled = [p * x for p, x in zip(self._prior, features, strict=True)]
        expected = sum(scaled)
        if expected < _SHORTEST_S / _SCALES:
            return
        self.samples += 1
        self._learn_scale(math.log(min(max(seconds / expected, 1 / _SCALES), _SCALES)))
        # Errors count relative to the time, halfway to what was expected: a worker that has
        # become slower is believed as soon as one that has become faster.
        unit = math.sqrt(seconds * expected * math.exp(self._log_scale))
        row = [x / unit for x in scaled]
        self._fade(row)
        for i, x in enumerate(row):
            self._targets[i] += x * seconds / unit
            products = self._products[i]
            for j, y in enumerate(row):
                products[j] += x * y
        self._unsolved += 1

    def predict(self, features: tuple[float, ...]) -> float:
        return _dot(self.solve(), features)

    def solve(self) -> tuple[float, ...]:
        """The coefficients; computed when samples have arrived since the last time."""
        if self._unsolved:
            self._descend()
            self._solution = tuple(p * f for p, f in zip(self._prior, self._factors, strict=True))
            self._unsolved = 0
        return self._solution

    def _fade(self, row: list[float]) -> None:
        """Forget of older samples what this one tells anew, and no more (directional forgetting,
        Kulhavý 1987): as long as all samples are alike, they say nothing about others, and a batch
        or a prompt of another size must not be predicted from the prior."""
        seen = [_dot(products, row) for products in self._products]
        weight = _dot(seen, row)
        if weight < _SHORTEST_S:
            return
        forget = (1.0 - _MEMORY) / weight
        target = _dot(self._targets, row)
        for i, s in enumerate(seen):
            self._targets[i] -= forget * s * target
            products = self._products[i]
            for j, other in enumerate(seen):
                products[j] -= forget * s * other
            products[i] = max(products[i], 0.0)  # which roundings may not make it

    def _learn_scale(self, log_ratio: float) -> None:
        memory = min(_SCALE_MEMORY, 1.0 - 1.0 / self.samples)
        self._log_scale = memory * self._log_scale + (1.0 - memory) * log_ratio

    def _descend(self) -> None:
        """Coordinate descent with bounds (Franc, Hlaváč, Navara 2005)."""
        scale = math.exp(self._log_scale)
        # Rows are in units of measured time, where the scaled prior's are about one.
        ridge = _PRIOR_WEIGHT / scale**2
        settled = self.samples > _SETTLED
        factors = self._factors = self._factors if settled else [scale] * len(self._prior)
        rows = self._with_tie(scale)
        for _ in range(_SWEEPS if settled else _FIRST_SWEEPS):
            moved = 0.0
            for i, products in enumerate(rows):
                before = factors[i]
                others = _dot(products, factors) - products[i] * before
                target = self._targets[i] + ridge * scale - others
                factors[i] = max(target / (products[i] + ridge), 0.0)
                moved = max(moved, abs(factors[i] - before))
            if moved <= _STILL * scale:
                return

    def _with_tie(self, scale: float) -> list[list[float]]:
        """The products, and the square of the difference of the tied factors, relative to both: so
        five times the prior's proportion is held against a sample as little as a fifth of it."""
        if self._tied is None:
            return self._products
        rows = [row.copy() for row in self._products]
        i, j = self._tied
        one, other = self._factors[i], max(self._factors[j], _TIED_LEAST * self._factors[i])
        weight = _TIE_WEIGHT / max(one * other, _STILL * scale**2)
        rows[i][i] += weight
        rows[j][j] += weight
        rows[i][j] -= weight
        rows[j][i] -= weight
        return rows


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    """A loop: a generator takes twice as long, and samples come by the thousand per second."""
    total = 0.0
    for x, y in zip(one, other, strict=True):
        total += x * y
    return total


@dataclass(slots=True)
class _WorkerFit:
    """Samples of one worker, or of all that are alike."""

    prefill: NonNegativeFit
    decode: NonNegativeFit
    mean_context: float = 0.0

    @classmethod
    def of(cls, prior: WorkerCost) -> _WorkerFit:
        prefill, decode = prior.prefill, prior.decode
        return cls(
            NonNegativeFit((prefill.base_s, prefill.token_s, prefill.pair_s), tied=(1, 2)),
            NonNegativeFit((decode.base_s, decode.sequence_s)),
        )

    def prefill_cost(self) -> PrefillCost:
        base, token, pair = self.prefill.solve()
        return PrefillCost(base, token, pair, self.prefill.samples, self.mean_context)

    def decode_cost(self) -> DecodeCost:
        base, sequence = self.decode.solve()
        return DecodeCost(base, sequence, self.decode.samples)

    def add_prefills(self, computed: _Prefills) -> None:
        features = (float(computed.prompts), float(computed.tokens), computed.pairs)
        self.prefill.add(features, computed.end_s - computed.start_s)
        self.mean_context += 0.1 * (computed.pairs / computed.tokens - self.mean_context)


@dataclass(slots=True)
class _Prefills:
    """The prompts that ended with one step, and what the worker took for them: the time since the
    first of them began, or those before them ended. Some of it went to the next ones; what went to
    these before is not in it."""

    after_s: float = 0.0  # when those before them ended; Unix, the worker's clock
    start_s: float = math.inf
    end_s: float = 0.0
    prompts: int = 0
    tokens: int = 0
    pairs: float = 0.0

    def add(self, tokens: int, context: int, start_s: float) -> None:
        self.start_s = max(min(self.start_s, start_s), self.after_s)
        self.prompts += 1
        self.tokens += tokens
        self.pairs += pairs(tokens, context)


class WorkerSamples:
    """What one life of a worker reports, and what it says about its costs.

    `alike` is shared by workers that should be equally fast; it speaks for those that have not said
    enough yet.
    """

    def __init__(self, alike: _WorkerFit, prior: WorkerCost) -> None:
        self._own = _WorkerFit.of(prior)
        self._alike = alike
        self._latest = _Prefills()
        self._began_s = 0.0  # the last of those that have ended; Unix, the worker's clock
        self._sampled_until = 0.0
        self._cost: WorkerCost | None = None

    def cost(self) -> WorkerCost:
        """Cached until the next sample."""
        if self._cost is None:
            own, alike = self._own, self._alike
            prefill = own if own.prefill.samples >= MIN_SAMPLES else alike
            decode = own if own.decode.samples >= MIN_SAMPLES else alike
            self._cost = WorkerCost(prefill.prefill_cost(), decode.decode_cost())
        return self._cost

    def add_prefill(self, tokens: int, context: int, span: Span) -> None:
        """`tokens` were computed after `context` cached ones within `span`.

        Prompts overlap in a worker, and short ones share steps: those that ended with one step are
        one sample, made when prompts of a later step end. The time of a prompt that is told of
        after later ones is in theirs already. One that began before others and ended after them was
        overtaken: what it took is the time of the steps in which it was, if told.
        """
        late_s = span.end_s - self._latest.end_s
        overtaken = late_s > _SAME_STEP_S and span.start_s < self._began_s - _SAME_STEP_S
        self._began_s = max(self._began_s, span.start_s)
        if late_s > _SAME_STEP_S:
            self._learn()
            self._latest = _Prefills(after_s=self._latest.end_s, end_s=span.end_s)
        if late_s >= -_SAME_STEP_S and tokens > 0 and not overtaken:
            self._latest.add(tokens, context, span.start_s)
        if overtaken and tokens > 0 and span.compute_s:
            alone = _Prefills(end_s=span.end_s)
            alone.add(tokens, context, span.end_s - span.compute_s)
            self._add(alone)

    def _learn(self) -> None:
        computed = self._latest
        if computed.prompts and computed.end_s >= self._sampled_until + SAMPLE_PAUSE_S:
            self._sampled_until = computed.end_s
            self._add(computed)

    def _add(self, computed: _Prefills) -> None:
        self._own.add_prefills(computed)
        self._alike.add_prefills(computed)
        self._cost = None

    def add_steps(self, running: float, seconds: float) -> None:
        """Decode steps took `seconds` each, with `running` sequences in them."""
        features = (1.0, running)
        self._own.decode.add(features, seconds)
        self._alike.decode.add(features, seconds)
        self._cost = None


class CostModel:
    """All fits of a conductor. Of `prior`, the proportions matter more than the size, which the
    first samples tell."""

    def __init__(self, prior: WorkerCost = UNKNOWN_WORKER) -> None:
        self._prior = prior
        self._alike: dict[tuple[str, int], _WorkerFit] = {}
        self._routes = {route: _transfer_fit(cost) for route, cost in TRANSFER_PRIORS.items()}
        self._handoff = _transfer_fit(HANDOFF_PRIOR)
        self._transfers: TransferCosts | None = None
        self._log_ttft_factor = 0.0

    @property
    def ttft_factor(self) -> float:
        """What estimates of TTFT are to be multiplied by: they know nothing of steps that are
        shared with others, nor of the way to the worker and back."""
        return math.exp(self._log_ttft_factor)

    def add_ttft(self, estimated_s: float, actual_s: float) -> None:
        """What came of an estimate."""
        if estimated_s > 0 and actual_s > 0:
            ratio = min(max(actual_s / estimated_s, 1 / _TTFT_FACTORS), _TTFT_FACTORS)
            self._log_ttft_factor += _TTFT_STEP * (math.log(ratio) - self._log_ttft_factor)

    def begin(self, info: WorkerInfo) -> WorkerSamples:
        """For a life of a worker."""
        kind, prior = (info.device, info.threads), _prior_of(self._prior, info)
        alike = self._alike.setdefault(kind, _WorkerFit.of(prior))
        return WorkerSamples(alike, prior)

    def transfers(self) -> TransferCosts:
        """Cached until the next sample."""
        if self._transfers is None:
            routes = {route: _transfer_cost(fit) for route, fit in self._routes.items()}
            self._transfers = TransferCosts(routes, _transfer_cost(self._handoff))
        return self._transfers

    def add_fetch(self, tier: Tier, local: bool, num_bytes: int, seconds: float) -> None:
        self._routes[Route(tier, local)].add((1.0, float(num_bytes)), seconds)
        self._transfers = None

    def add_handoff(self, num_bytes: int, seconds: float) -> None:
        self._handoff.add((1.0, float(num_bytes)), seconds)
        self._transfers = None


def _prior_of(prior: WorkerCost, info: WorkerInfo) -> WorkerCost:
    """The prior with the proportion of attention to products that the worker's model has. Both are
    products of matrices, and kernels of either reach about the same share of a device's peak."""
    if not 0.0 < info.pair_to_token < 1.0:
        return prior
    pair_s = prior.prefill.token_s * info.pair_to_token
    return replace(prior, prefill=replace(prior.prefill, pair_s=pair_s))


def _transfer_fit(prior: TransferCost) -> NonNegativeFit:
    return NonNegativeFit((prior.latency_s, prior.byte_s))


def _transfer_cost(fit: NonNegativeFit) -> TransferCost:
    latency, byte = fit.solve()
    return TransferCost(latency, byte, fit.samples)
