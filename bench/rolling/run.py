"""A run: load on a cluster at peace, then while each of its processes is restarted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.chaos.checks import find_leaks
from bench.chaos.cluster import Shape, running
from bench.chaos.questions import Questions
from bench.chaos.references import find_answers
from bench.chaos.waiting import until
from bench.rolling.load import Load
from bench.rolling.report import Result
from bench.rolling.roll import Restart, roll

_ANSWER_S = 300.0
_LIVE_S = 240.0


async def run(
    shape: Shape,
    questions: Questions,
    names: Sequence[str],
    clients: tuple[int, int],
    undisturbed: int,
    logs: Path | None = None,
    tell: Callable[[Restart], None] = lambda _: None,
) -> Result:
    """`names`: who is restarted. `clients`: how many that go on elsewhere, and plain ones.
    `undisturbed`: requests that are answered before the first restart. Raises ChaosFailed."""
    async with running(shape, logs) as cluster:
        urls = [cluster.url(name) for name in shape.conductor_names]
        load = Load(urls, questions, await find_answers(urls, questions.all))

        async def enough() -> bool:
            return len(load.answered) >= undisturbed

        loading = asyncio.create_task(load.run(*clients), name="load")
        try:
            await until(enough, _ANSWER_S)
            restarts = await roll(cluster, names, tell)
        finally:
            load.stop()
            await loading
        await cluster.all_live(_LIVE_S)
        leaked = await find_leaks(cluster)
        left = await cluster.stop()
        return Result(tuple(load.answered), tuple(restarts), leaked, left)
