"""A device that computes nothing: it only knows what a step takes.

One unit stands for `grain` tokens. A step that decodes lasts `grain` decode steps of a real device
(micro-steps), between which the step's prefill is spread: as many of them as it needs carry a full
budget of prompt tokens, the others decode only.

    units    | decode 1 unit + prefill 3 chunks                          |
    tokens   | d+chunk | d+chunk | d+chunk | d | d | d | ... grain of them |

A step without a decode is a prefill of all its tokens. The tokens that come out say how long the
longest micro-step was, in microseconds: that is how the client knows its worst gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from baton.engine.batch import Batch, BatchItem, BatchResult
from baton.errors import InternalError
from baton.types.request import SampledToken
from sim.costs.compute import Prefill, StepCost
from sim.costs.cores import Kind

TICK_S = 1e-6  # of what a token says


class ModelledDevice:
    """Both the runner and the pace of `sim.steps.ModelledSteps`; `launch` is never called."""

    queued = False

    def __init__(self, cost: StepCost, grain: int, budget: int, group_ends: Sequence[int]) -> None:
        self.group_ends = group_ends
        self.prefill_s = 0.0  # of steps so far, by what they were for
        self.decode_s = 0.0
        self.kind = Kind.PREFILL  # of the running step
        self._cost = cost
        self._grain = grain
        self._budget = budget  # prompt tokens of a micro-step
        self._worst_s = 0.0  # of the micro-steps of the running step

    def of(self, batch: Batch) -> float:
        grain = self._grain
        decode = [item.start * grain for item in batch.items if _decodes(item)]
        prompts = [
            Prefill(item.length * grain, item.start * grain)
            for item in batch.items
            if not _decodes(item)
        ]
        self.kind = Kind.DECODE if decode else Kind.PREFILL
        if not decode:
            seconds = self._worst_s = self._cost.seconds(prompts, ())
            self.prefill_s += seconds
            return seconds
        alone_s = self._worst_s = self._cost.seconds((), decode)
        seconds = grain * alone_s
        self.decode_s += seconds
        if prompts:
            shared = min(grain, -(-sum(prompt.new for prompt in prompts) // self._budget))
            self._worst_s = self._cost.seconds([_share(p, shared) for p in prompts], decode)
            more_s = shared * (self._worst_s - alone_s)
            self.prefill_s += more_s
            seconds += more_s
        return seconds

    def begin(self, batch: Batch) -> tuple[BatchItem, ...]:
        return batch.items

    def write(self, items: Sequence[BatchItem], layer_begin: int, layer_end: int) -> None:
        """There are no bytes."""

    def end(self, items: Sequence[BatchItem]) -> BatchResult:
        told = round(self._worst_s / TICK_S)
        return BatchResult(
            tuple(
                None if item.sample is None else SampledToken(told, item.sample.index)
                for item in items
            )
        )

    def launch(self, *_: object) -> NoReturn:
        raise InternalError("a modelled step takes virtual time: it is run by ModelledSteps")

    def close(self) -> None:
        """There is nothing to free."""


def _decodes(item: BatchItem) -> bool:
    """Rather than being a chunk of a prompt that is one unit long."""
    return item.follows or (
        len(item.tokens) == 1 and item.sample is not None and item.sample.index > 0
    )


def _share(prompt: Prefill, steps: int) -> Prefill:
    """What one of so many micro-steps computes of it, about halfway."""
    new = -(-prompt.new // steps)
    return Prefill(new, prompt.context + (prompt.new - new) // 2)
