"""How long the device waits between two steps of a real engine: scheduling, and the event loop."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from baton.bench.engine_phases import OnFigure
from baton.bench.engine_rig import Rig
from baton.engine.batch import (
    Batch,
    BatchResult,
    Computed,
    Launched,
    LayerCallback,
    LayerGate,
    Runner,
)
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.events import KvFilled, KvReady, KvWanted
from baton.engine.loop import Engine
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    GenerationTask,
    SampledToken,
    SamplingParams,
)

_PROMPT = 16  # tokens
_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class LoopTiming:
    """Of decode steps with all of `sequences` in them, medians in seconds.

    `gap_s` is the time in which no step was computed or queued: from a step's end until the next
    one was launched, and 0 when that had happened before.
    """

    sequences: int
    steps: int
    step_s: float  # from one launch to the next
    gap_s: float

    @property
    def share(self) -> float:
        """Of a step's time that the device waits."""
        return self.gap_s / self.step_s


@dataclass(slots=True)
class _Step:
    items: int
    tokens: int
    start_s: float
    end_s: float = 0.0


@dataclass(slots=True)
class _Clocked:
    """A runner that notes when each step was launched and when it had ended."""

    runner: Runner
    steps: list[_Step] = field(default_factory=list)

    def launch(
        self,
        batch: Batch,
        on_layers: LayerCallback | None = None,
        before_layers: LayerGate | None = None,
    ) -> Launched:
        step = _Step(len(batch.items), batch.num_tokens, time.perf_counter())
        self.steps.append(step)
        launched = self.runner.launch(batch, on_layers, before_layers)
        step.end_s = time.perf_counter()
        return launched if isinstance(launched, Computed) else _ClockedStep(launched, step)

    def close(self) -> None:
        """The runner belongs to somebody else."""


@dataclass(frozen=True, slots=True)
class _ClockedStep:
    launched: Launched
    step: _Step

    def wait(self) -> BatchResult:
        result = self.launched.wait()
        self.step.end_s = time.perf_counter()
        return result


@dataclass(slots=True)
class _Listener:
    """Waits until `left` attempts have finished."""

    left: int
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        self.left -= sum(output.finish is not None for output in outputs)
        if self.left == 0:
            self.done.set()

    def on_kv_ready(self, ready: tuple[KvReady, ...]) -> None:
        """Nothing is handed off."""

    def on_kv_wanted(self, wanted: tuple[KvWanted, ...]) -> None:
        """Nothing is fetched."""

    def on_kv_filled(self, filled: tuple[KvFilled, ...]) -> None:
        """Nothing is kept."""

    def on_blocks_changed(self) -> None:
        """Nobody asks for the load."""

    def on_prefilled(
        self, attempt: AttemptId, first: SampledToken, num_blocks: int, cached_tokens: int
    ) -> None:
        """Nothing is handed off."""


def measure_loop(
    rig: Rig, batches: Sequence[int], steps: int, on_figure: OnFigure
) -> tuple[LoopTiming, ...]:
    """For each number of sequences, about `steps` decode steps of an engine over the rig's runner.
    Numbers whose sequences do not fit into the pool are left out."""
    timings = []
    tokens = _PROMPT + steps
    each = rig.model.layout.blocks_for(tokens) + 1  # steps launched ahead take blocks early
    fitting = rig.num_blocks // each
    for sequences in batches:
        if sequences <= fitting and tokens < rig.model.spec.max_model_len:
            on_figure(f"engine loop {sequences} sequences")
            clocked = _Clocked(rig.runner)
            asyncio.run(_serve(rig, clocked, sequences, steps))
            timings.append(_timing(clocked.steps, sequences))
    return tuple(timings)


async def _serve(rig: Rig, runner: Runner, sequences: int, steps: int) -> None:
    config = EngineConfig(
        layout=rig.model.layout,
        num_blocks=rig.num_blocks,
        max_model_len=rig.model.spec.max_model_len,
        max_num_seqs=sequences,
        max_batch_tokens=max(2048, sequences * _PROMPT),  # all prompts in the first step
        prefix_caching=False,
    )
    listener = _Listener(sequences)
    engine = Engine(runner, BlockPool(rig.num_blocks), config, listener)
    sampling = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(engine.run())
        for number in range(sequences):
            prompt = tuple((number + at) % rig.model.spec.vocab_size for at in range(_PROMPT))
            engine.submit(GenerationTask(AttemptId(f"bench-{number}"), prompt, sampling))
        async with asyncio.timeout(_DEADLINE_S):
            await listener.done.wait()
        engine.stop()


def _timing(steps: Sequence[_Step], sequences: int) -> LoopTiming:
    """Of neighbouring steps that both decode every sequence."""

    def full(step: _Step) -> bool:
        return step.items == step.tokens == sequences

    pairs = [(one, two) for one, two in pairwise(steps) if full(one) and full(two)]
    return LoopTiming(
        sequences,
        len(pairs),
        statistics.median(two.start_s - one.start_s for one, two in pairs),
        statistics.median(max(0.0, two.start_s - one.end_s) for one, two in pairs),
    )
