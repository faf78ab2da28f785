"""A worker process: load the model, then serve (see `serving.py`).

    load -> a life as prefill worker -> ... SetRole ... -> a life as decode worker -> ... -> close

What stays from one life to the next is said in `lives.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

from baton.types.fleet import Role, WorkerInfo
from baton.worker.build import build, worker_name
from baton.worker.config import WorkerConfig
from baton.worker.lifecycle import StopSignals, exit_now
from baton.worker.lives import Make, live_on
from baton.worker.metrics import WorkerMetrics
from baton.worker.parts import WorkerParts
from baton.worker.serving import (
    CLOSE_TIMEOUT_S,
    Place,
    Service,
    begun,
    run_process,
    serve,
)

log = logging.getLogger(__name__)


def main(config: WorkerConfig, role: Role, makes: Mapping[Role, Make]) -> None:
    """Run the worker, first as `role`, and end the process: 0 after an orderly shutdown, 1 after a
    failure, 2 when the configuration is wrong. `makes` has what it can be."""
    run_process(worker_name(config, role), config.log_level, _run(config, role, makes))


async def _run(config: WorkerConfig, role: Role, makes: Mapping[Role, Make]) -> None:
    metrics = WorkerMetrics()
    async with begun(config, metrics) as (place, signals):
        built = await _unless_stopped(build(config, role), signals)
        parts = replace(built, metrics=metrics, tls=place.tls)
        await _serve(place, role, makes, parts, signals)


async def _serve(
    place: Place,
    role: Role,
    makes: Mapping[Role, Make],
    parts: WorkerParts,
    signals: StopSignals,
) -> None:

    async def one_life(info: Callable[[str], WorkerInfo], service: Service) -> Role | None:
        return await serve(place, info, service, signals)

    try:
        await live_on(parts, role, makes, one_life)
    finally:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await place.aclose()
            await parts.close()


async def _unless_stopped(
    start: Coroutine[Any, Any, WorkerParts], signals: StopSignals
) -> WorkerParts:
    """Ends the process when it was told to stop first: nothing can interrupt the loading."""
    loading = asyncio.create_task(start, name="load")
    stopped = asyncio.create_task(signals.stop.wait(), name="stop")
    await asyncio.wait({loading, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not loading.done():
        log.info("stopped while starting")
        exit_now(0)
    return loading.result()
