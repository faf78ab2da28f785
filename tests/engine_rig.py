"""An engine on a fake runner, with a listener that remembers: for tests of and around engines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.engine.batch import Batch
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.events import KvFilled, KvReady, KvWanted
from baton.engine.loop import Engine
from baton.types.fleet import BlockState
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    GenerationTask,
    SampledToken,
    SamplingParams,
)
from tests.fake_runner import FakeMemory, FakeRunner, fake_layout

BLOCK = 4
LAYERS = 4
Event = tuple[str, object]


@dataclass
class Recorder:
    """An EngineListener that remembers, and lets tests wait."""

    events: list[Event] = field(default_factory=list)
    answers: dict[AttemptId, list[int]] = field(default_factory=dict)
    finishes: dict[AttemptId, Finish] = field(default_factory=dict)
    ready: dict[AttemptId, list[KvReady]] = field(default_factory=dict)
    prefilled: dict[AttemptId, tuple[SampledToken, int, int]] = field(default_factory=dict)
    wanted: dict[AttemptId, KvWanted] = field(default_factory=dict)
    filled: list[KvFilled] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    on_output: Callable[[AttemptOutput], None] = lambda output: None
    on_ready: Callable[[KvReady], None] = lambda ready: None

    def on_kv_ready(self, ready: tuple[KvReady, ...]) -> None:
        for one in ready:
            self.events.append(("ready", one.attempt))
            self.ready.setdefault(one.attempt, []).append(one)
            self.on_ready(one)
        self.changed.set()

    def on_prefilled(
        self, attempt: AttemptId, first: SampledToken, num_blocks: int, cached_tokens: int
    ) -> None:
        self.events.append(("prefilled", attempt))
        self.prefilled[attempt] = (first, num_blocks, cached_tokens)
        self.changed.set()

    def on_kv_wanted(self, wanted: tuple[KvWanted, ...]) -> None:
        for one in wanted:
            self.events.append(("wanted", one.attempt))
            self.wanted[one.attempt] = one
        self.changed.set()

    def on_kv_filled(self, filled: tuple[KvFilled, ...]) -> None:
        self.filled += filled

    def on_blocks_changed(self) -> None:
        self.changed.set()

    def on_outputs(self, outputs: tuple[AttemptOutput, ...]) -> None:
        for output in outputs:
            self.events.append(("output", output.attempt))
            assert output.attempt not in self.finishes, "output after the finish"
            answer = self.answers.setdefault(output.attempt, [])
            answer += [token.token_id for token in output.tokens]
            if output.finish is not None:
                self.finishes[output.attempt] = output.finish
            self.on_output(output)
        self.changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def finish(self, attempt: AttemptId) -> Finish:
        await self.until(lambda: attempt in self.finishes)
        return self.finishes[attempt]


@dataclass
class Rig:
    engine: Engine
    config: EngineConfig
    pool: BlockPool
    runner: FakeRunner
    heard: Recorder
    task: asyncio.Task[None] | None = None

    def in_state(self, *states: BlockState) -> int:
        return self.engine.load().blocks_in(*states)

    async def until_idle(self) -> None:
        """A step may still be on its way for sequences that have ended."""
        async with asyncio.timeout(20):
            while self.in_state(BlockState.ACTIVE):  # noqa: ASYNC110
                await asyncio.sleep(0)
        self.assert_idle()

    def assert_idle(self) -> None:
        self.engine.check_integrity()
        load = self.engine.load()
        assert (load.running, load.waiting, load.waiting_tokens) == (0, 0, 0)
        assert self.in_state(BlockState.FREE, BlockState.CACHED) == self.pool.num_blocks


def make_rig(
    num_blocks: int = 32,
    layer_groups: int = 1,
    before_step: Callable[[Batch], None] = lambda batch: None,
    eos: tuple[int, ...] = (),
    device: type[FakeRunner] = FakeRunner,
    **settings: int | bool,
) -> Rig:
    layout = fake_layout(BLOCK, LAYERS)
    values: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8}
    values |= settings
    config = EngineConfig(
        layout, num_blocks, eos_token_ids=eos, layer_groups=layer_groups, **values
    )
    pool = BlockPool(num_blocks)
    runner = device(layout, FakeMemory(), layer_groups, before_step)
    heard = Recorder()
    engine = Engine(runner, pool, config, heard, wall_clock=lambda: 1e9)
    return Rig(engine, config, pool, runner, heard)


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    """Run the engine; afterwards nothing may be left in it."""
    rig.task = asyncio.create_task(rig.engine.run())
    try:
        yield rig
    finally:
        rig.engine.stop()
        async with asyncio.timeout(20):
            await rig.task
    rig.assert_idle()


def make_task(
    name: str,
    prompt_len: int = 10,
    max_tokens: int = 6,
    output: tuple[int, ...] = (),
    timeout_s: float | None = None,
    salt: str = "",
    **params: int | float | bool | tuple[int, ...],
) -> GenerationTask:
    start = 100 * sum(name.encode()) % 900
    return GenerationTask(
        AttemptId(name),
        tuple(range(start, start + prompt_len)),
        SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        output=output,
        timeout_s=timeout_s,
        cache_salt=salt,
    )


class Gate:
    """Holds steps in the engine's thread until they are let through."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.let = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.entered.set()
        assert self.let.wait(20)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 20)


class Faulty:
    """Raises in the steps whose turn it is."""

    def __init__(self, error: Exception, steps: set[int]) -> None:
        self.error, self.steps, self.seen = error, steps, 0

    def __call__(self, batch: Batch) -> None:
        self.seen += 1
        if self.seen in self.steps:
            raise self.error


def covered(ready: list[KvReady]) -> dict[tuple[int, int], int]:
    """(logical block, layer) -> pool block; each may be published only once."""
    cells: dict[tuple[int, int], int] = {}
    for one in ready:
        for index, block in enumerate(one.blocks, one.first_block):
            for layer in range(one.layer_begin, one.layer_end):
                assert (index, layer) not in cells, "published twice"
                cells[index, layer] = block
    return cells
