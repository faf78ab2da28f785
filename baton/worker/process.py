"""A worker process: load the model, then serve (see `serving.py`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from baton.types.fleet import Role
from baton.worker.build import build, worker_name
from baton.worker.config import WorkerConfig
from baton.worker.lifecycle import StopSignals, exit_now
from baton.worker.parts import WorkerParts
from baton.worker.serving import (
    CLOSE_TIMEOUT_S,
    Place,
    Service,
    cluster_token,
    find_registry,
    run_process,
    serve,
)

log = logging.getLogger(__name__)


def main(config: WorkerConfig, role: Role, make: Callable[[WorkerParts], Service]) -> None:
    """Run the worker and end the process: 0 after an orderly shutdown, 1 after a failure, 2 when
    the configuration is wrong."""
    run_process(worker_name(config, role), config.log_level, _run(config, role, make))


async def _run(config: WorkerConfig, role: Role, make: Callable[[WorkerParts], Service]) -> None:
    registry = find_registry(config.conductor, config.redis, config.cluster_name)
    cluster_token()
    signals = StopSignals()
    signals.install()
    parts = await _unless_stopped(build(config, role), signals)
    place = Place(config.conductor, registry, config.listen, config.advertise, config.drain_timeout)
    try:
        await serve(place, partial(parts.info, role), make(parts), signals)
    finally:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
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
