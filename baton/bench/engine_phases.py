"""Prefill and decode through the runner, next to what the machine's ceilings allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.bench.engine_ceilings import Bound, Ceilings
from baton.bench.engine_cost import Chunk, Work, prompt_chunks
from baton.bench.engine_rig import Model, Rig, run
from baton.bench.engine_time import Timing, measure

_STEPS = 4
"""Decode steps in one go: while one is computed, the next is launched, as in the engine."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure and for how long."""

    prompts: tuple[int, ...]  # tokens of prefills
    decodes: tuple[tuple[int, int], ...]  # (sequences, tokens of each, the new one included)
    step_tokens: int  # of one step, as the engine's max_batch_tokens
    budget_s: float  # per figure
    limit_s: float  # a point that would take longer at the ceiling is skipped
    kv_bytes: int  # the pool is not made larger than this
    # (sequences, tokens of each, tokens of a prompt, tokens in front of these)
    mixed: tuple[tuple[int, int, int, int], ...] = ()

    def blocks(self, model: Model) -> int:
        """Of a pool for the largest point that the model and `kv_bytes` allow; at least one."""
        points = [*_prefills(self), *_decodes(self), *_mixed(self)]
        possible = [p for p in points if p.longest <= model.spec.max_model_len]
        wanted = [p.blocks(model) for p in possible]
        most = self.kv_bytes // model.layout.block_bytes
        return max([blocks for blocks in wanted if blocks <= most], default=1)


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure. `tokens` are those of one call; for kernels, rows."""

    name: str
    tokens: int
    timing: Timing
    work: Work


@dataclass(frozen=True, slots=True)
class Skipped:
    """A figure that was not measured, and why."""

    name: str
    reason: str


Figure = Measured | Skipped
OnFigure = Callable[[str], None]  # the name of what is being measured


def measure_prefills(
    rig: Rig, plan: Plan, ceilings: Ceilings, on_figure: OnFigure
) -> tuple[Figure, ...]:
    """Whole prompts, each alone, chunk after chunk."""
    return _measure_all(_prefills(plan), rig, plan, ceilings, on_figure)


def measure_decodes(
    rig: Rig, plan: Plan, ceilings: Ceilings, on_figure: OnFigure
) -> tuple[Figure, ...]:
    """Single steps of one token per sequence."""
    return _measure_all(_decodes(plan), rig, plan, ceilings, on_figure)


def measure_mixed(
    rig: Rig, plan: Plan, ceilings: Ceilings, on_figure: OnFigure
) -> tuple[Figure, ...]:
    """Single steps of one token per sequence and of a chunk of a prompt."""
    return _measure_all(_mixed(plan), rig, plan, ceilings, on_figure)


@dataclass(frozen=True, slots=True)
class _Point:
    name: str
    tokens: int  # by which rates are counted
    steps: Sequence[Sequence[Chunk]]
    repeats: int = 1  # without a pause in between

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(chunk.start + chunk.tokens for step in self.steps for chunk in step)

    def blocks(self, model: Model) -> int:
        """That the largest step needs."""
        return max(
            sum(model.layout.blocks_for(chunk.start + chunk.tokens) for chunk in step)
            for step in self.steps
        )


def _prefills(plan: Plan) -> list[_Point]:
    return [
        _Point(
            f"prefill {tokens}",
            tokens,
            [[chunk] for chunk in prompt_chunks(tokens, plan.step_tokens)],
        )
        for tokens in plan.prompts
    ]


def _decodes(plan: Plan) -> list[_Point]:
    return [
        _Point(f"decode {batch} x {context}", batch, [[Chunk(context - 1, 1)] * batch], _STEPS)
        for batch, context in plan.decodes
    ]


def _mixed(plan: Plan) -> list[_Point]:
    return [
        _Point(
            f"mixed {batch} x {context} and {tokens} after {start}",
            batch + tokens,
            [[*[Chunk(context - 1, 1)] * batch, Chunk(start, tokens)]],
        )
        for batch, context, tokens, start in plan.mixed
    ]


def _measure_all(
    points: Sequence[_Point], rig: Rig, plan: Plan, ceilings: Ceilings, on_figure: OnFigure
) -> tuple[Figure, ...]:
    figures = []
    for point in points:
        on_figure(point.name)
        figures.append(_measure(rig, point, plan, ceilings))
    return tuple(figures)


def _measure(rig: Rig, point: _Point, plan: Plan, ceilings: Ceilings) -> Figure:
    work = sum((rig.model.cost.step(step) for step in point.steps), Work())
    reason = _obstacle(rig, point, ceilings.bound(work), plan)
    if reason:
        return Skipped(point.name, reason)
    batches = [rig.batch(step) for step in point.steps] * point.repeats
    timing = measure(lambda: run(rig.runner, batches), plan.budget_s).of_one(point.repeats)
    return Measured(point.name, point.tokens, timing, work)


def _obstacle(rig: Rig, point: _Point, bound: Bound, plan: Plan) -> str:
    """Why the point cannot be measured; empty when it can."""
    most = rig.model.spec.max_model_len
    if point.longest > most:
        return f"the model's contexts have at most {most} tokens"
    needed = point.blocks(rig.model)
    if needed > rig.num_blocks:
        mib = needed * rig.model.layout.block_bytes >> 20
        return f"needs {mib} MiB of KV, more than there is room for"
    if bound.seconds > plan.limit_s:
        return f"takes {bound.seconds:.0f} s even at the ceiling"
    return ""
