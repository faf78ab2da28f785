"""Exports the traces of requests that have ended, without ever holding a request up.

    end of a request -> queue (bounded) -> [a moment, for the workers' last spans] -> collector

A collector that is slow, or gone, costs spans and nothing else: what does not fit the queue is
dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from baton.types.trace import TraceContext
from conductor.span_tree import TreeSpan, span_tree
from conductor.trace import Timeline

LINGER_S = 1.0  # until a timeline is complete: a worker that is cancelled says so a little later
POLL_S = 0.25
MAX_WAITING = 2048  # timelines
MAX_BATCH = 64  # of them, in one message
FLUSH_S = 2.0  # at the end, for what is left

Trees = Sequence[tuple[TraceContext, Sequence[TreeSpan]]]

log = logging.getLogger(__name__)


class Sender(Protocol):
    """Both calls block; they are made in a thread."""

    def send(self, traces: Trees) -> bool: ...

    def close(self) -> None:
        """May be called while `send` runs, which then returns soon."""


class SpanExport:
    """`count(outcome, n)` is told what became of traces: sent, failed or dropped."""

    def __init__(
        self, open_sender: Callable[[], Sender], count: Callable[[str, int], None]
    ) -> None:
        self._open_sender = open_sender
        self._count = count
        self._waiting: deque[tuple[float, Timeline]] = deque()  # by when they are due
        self.running = False  # there is a sender

    def note_end(self, timeline: Timeline) -> None:
        """Its request has ended. Exported if it is sampled."""
        if not timeline.tracing.context.sampled:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._count("dropped", 1)
            return
        self._waiting.append((asyncio.get_running_loop().time() + LINGER_S, timeline))

    async def run(self) -> None:
        """Until cancelled; then what is left goes out, within FLUSH_S."""
        loop = asyncio.get_running_loop()
        threads = ThreadPoolExecutor(1, thread_name_prefix="spans")
        sender: Sender | None = None
        try:
            sender = await loop.run_in_executor(threads, self._open_sender)
            self.running = True
            while True:
                await asyncio.sleep(POLL_S)
                while batch := self._take(loop.time()):
                    await self._send(threads, sender, batch)
        finally:
            self.running = False
            if sender is not None:
                await self._flush(threads, sender)
                sender.close()
            threads.shutdown(wait=False, cancel_futures=True)

    def _take(self, due: float) -> list[Timeline]:
        batch: list[Timeline] = []
        while self._waiting and self._waiting[0][0] <= due and len(batch) < MAX_BATCH:
            batch.append(self._waiting.popleft()[1])
        return batch

    async def _flush(self, threads: ThreadPoolExecutor, sender: Sender) -> None:
        try:
            async with asyncio.timeout(FLUSH_S):
                while batch := self._take(float("inf")):
                    await self._send(threads, sender, batch)
        except TimeoutError:
            log.warning("%d traces were not exported before the end", len(self._waiting))
            self._count("dropped", len(self._waiting))

    async def _send(
        self, threads: ThreadPoolExecutor, sender: Sender, batch: Sequence[Timeline]
    ) -> None:
        """Timelines belong to the event loop, so the spans are made here."""
        trees = [(timeline.tracing.context, span_tree(timeline)) for timeline in batch]
        outcome = "failed"
        try:
            if await asyncio.get_running_loop().run_in_executor(threads, sender.send, trees):
                outcome = "sent"
        except Exception:
            log.exception("%d traces could not be exported", len(batch))
        finally:
            self._count(outcome, len(batch))
