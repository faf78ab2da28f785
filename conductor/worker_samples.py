"""Turns what a link hears from a worker into samples of the worker's costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.types.fleet import WorkerInfo
from baton.types.link import FetchPart, StepReport
from baton.types.request import Finish, FinishReason, Span
from conductor.cost_fit import SAMPLE_PAUSE_S, CostModel, WorkerSamples
from conductor.cost_model import WorkerCost

WINDOW_S = 0.1  # of decode steps that make one sample
FEWEST_STEPS = 4  # that do when the last sequence has ended
LONGEST_STEP_S = 10.0  # what takes longer is no step
_DONE = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.HANDED_OFF)

IsNear = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Computed:
    """What a worker was asked to compute, and to fetch for it."""

    prompt_tokens: int
    fetch: tuple[FetchPart, ...] = ()


class WorkerMeter:
    """Of one life of a worker. `is_near` says whether a peer of that name is on the same node."""

    def __init__(self, model: CostModel, info: WorkerInfo, is_near: IsNear) -> None:
        self._model = model
        self._layout = info.layout
        self._is_near = is_near
        self._samples: WorkerSamples = model.begin(info)
        self._window_from: float | None = None  # the report after which the steps are counted
        self._last = 0.0
        self._pause_until = 0.0
        self._steps = 0
        self._sequences = 0

    def cost(self) -> WorkerCost:
        return self._samples.cost()

    def on_report(self, report: StepReport, now: float) -> None:
        """Called for every engine step: counts only, and takes a sample now and then."""
        tokens = going = 0
        for output in report.outputs:
            if output.tokens:
                tokens += 1
                if output.finish is None:
                    going += 1
        if not tokens:
            return
        if self._window_from is not None and now - self._last < LONGEST_STEP_S:
            self._steps += 1
            self._sequences += tokens
            long = now - self._window_from >= WINDOW_S
            if long or (not going and self._steps >= FEWEST_STEPS):
                self._take(now)
        else:
            self._restart(now)
        self._last = now
        if not going:
            self._window_from = None  # until the next token, it may have nothing to do

    def on_finish(self, asked: Computed, finish: Finish, now: float) -> None:
        """An attempt for which the worker computed the prompt has ended."""
        if finish.reason not in _DONE:
            return
        spans = {span.name: span for span in finish.spans}
        fetch, prefill = spans.get("fetch"), spans.get("prefill")
        if prefill is not None:
            if fetch is not None and fetch.end_s <= prefill.end_s:
                prefill = replace(prefill, start_s=max(prefill.start_s, fetch.end_s))
            computed = asked.prompt_tokens - finish.cached_tokens
            self._samples.add_prefill(computed, finish.cached_tokens, prefill)
        if now < self._pause_until:
            return
        self._pause_until = now + SAMPLE_PAUSE_S
        if fetch is not None:
            self._add_fetch(asked, finish.cached_tokens, fetch)
        if finish.reason is FinishReason.HANDED_OFF and (handoff := spans.get("handoff")):
            blocks = self._layout.blocks_for(asked.prompt_tokens)
            seconds = handoff.end_s - handoff.start_s
            self._model.add_handoff(blocks * self._layout.block_bytes, seconds)

    def _take(self, now: float) -> None:
        assert self._window_from is not None
        seconds = (now - self._window_from) / self._steps
        self._samples.add_steps(self._sequences / self._steps, seconds)
        self._restart(now)

    def _restart(self, now: float) -> None:
        self._window_from = now
        self._steps = self._sequences = 0

    def _add_fetch(self, asked: Computed, cached_tokens: int, span: Span) -> None:
        """Counts when all of the plan came, and over one kind of path."""
        paths = {(part.tier, self._is_near(part.source.name)) for part in asked.fetch}
        if len(paths) == 1 and cached_tokens >= _end(asked.fetch) * self._layout.block_size:
            (tier, local) = paths.pop()
            num_bytes = sum(part.num_blocks for part in asked.fetch) * self._layout.block_bytes
            self._model.add_fetch(tier, local, num_bytes, span.end_s - span.start_s)


def _end(parts: Sequence[FetchPart]) -> int:
    return max(part.first_block + part.num_blocks for part in parts)
