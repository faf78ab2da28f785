"""Runs the runner in a thread of its own, so that the event loop goes on while a step computes."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType

from baton.engine.batch import Batch, BatchResult, LayerCallback, Runner
from baton.errors import InternalError

log = logging.getLogger(__name__)


class StepThread:
    """One thread, one step at a time; lives as long as the `with` block."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __enter__(self) -> StepThread:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-step")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown()

    async def execute(self, batch: Batch, on_layers: LayerCallback | None) -> BatchResult:
        """Raises whatever the runner raises. `on_layers` is called on the event loop, before this
        returns. When cancelled, waits until the step has ended: a thread cannot be interrupted,
        and nobody may have the batch's blocks while it writes to them.
        """
        loop = asyncio.get_running_loop()
        hop: LayerCallback | None = None
        if on_layers is not None:
            callback = on_layers

            def hop(layer_end: int) -> None:
                # The loop sees these and the step's end in the order in which they happened.
                loop.call_soon_threadsafe(callback, layer_end)

        step = loop.run_in_executor(self._executor, self._run, batch, hop)
        try:
            result = await asyncio.shield(step)
        except asyncio.CancelledError:
            await _settled(step)
            raise
        _check(batch, result)
        return result

    def _run(self, batch: Batch, on_layers: LayerCallback | None) -> BatchResult:
        return self._runner.launch(batch, on_layers).wait()


async def _settled(step: asyncio.Future[BatchResult]) -> None:
    """Return when the step has ended, however often the waiting task is cancelled."""
    while not step.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait((step,))
    error = step.exception()
    if error is not None:
        log.error("The last step failed.", exc_info=error)


def _check(batch: Batch, result: BatchResult) -> None:
    """A runner that skips or invents tokens would corrupt answers in silence."""
    if len(result.tokens) != len(batch.items):
        raise InternalError(
            f"The runner answered {len(result.tokens)} items of a batch of {len(batch.items)}."
        )
    for item, token in zip(batch.items, result.tokens, strict=True):
        asked = None if item.sample is None else item.sample.index
        got = None if token is None else token.index
        if asked != got:
            raise InternalError(f"The runner sampled output index {got} where {asked} was asked.")
