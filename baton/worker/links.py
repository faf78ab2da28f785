"""The worker's end of the links: who began which attempt, and what each conductor is told.

    conductor --Start/Cancel--> LinkServer --> Duty (prefill or decode) --> Engine
    conductor <--StepReport---- LinkServer <-- report(outputs of one step)

Always true: an attempt belongs to at most one link, from its start to its one Finish. When a link
ends, everything that was begun on it is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from baton.errors import BatonError, Overloaded, PeerGone, StaleAttempt
from baton.rpc.errors import to_wire
from baton.rpc.services import Duplex
from baton.types.fleet import WorkerLoad
from baton.types.link import (
    Cancel,
    ConductorMessage,
    Drain,
    Resync,
    StartDecode,
    StartPrefill,
    StepReport,
    WorkerMessage,
)
from baton.types.request import AttemptId, AttemptOutput, Finish, FinishReason
from baton.worker.kv_news import KvNews, Subscription

log = logging.getLogger(__name__)

LAST_REPORT_S = 2.0  # how long a closing link may take to send what is left


class Duty(Protocol):
    """What the worker does for attempts. Both calls return at once; results go to `report`."""

    def start(self, message: StartPrefill | StartDecode) -> None:
        """Raises the error to report when the attempt cannot be taken; then nothing is held."""

    def cancel(self, attempt: AttemptId, reason: str) -> None:
        """Stop and free everything. Harmless when the attempt is unknown."""


@dataclass(slots=True, eq=False)
class _Link:
    stream: Duplex[WorkerMessage, ConductorMessage]
    attempts: set[AttemptId] = field(default_factory=set)
    pending: list[AttemptOutput] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    said: WorkerLoad | None = None  # the load in the last report
    news: Subscription | None = None


class LinkServer:
    """Implements WorkerService. `load` is asked once per report; `news` is what is to be told of KV
    blocks."""

    def __init__(
        self, duty: Duty, load: Callable[[], WorkerLoad], news: KvNews | None = None
    ) -> None:
        self._duty = duty
        self._load = load
        self._news = news
        self._links: set[_Link] = set()
        self._owners: dict[AttemptId, _Link] = {}
        self._current: dict[str, AttemptId] = {}  # request id -> its live attempt
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    # -- what the worker calls -----------------------------------------------------------------

    def report(self, outputs: tuple[AttemptOutput, ...]) -> None:
        """Tell each conductor about its attempts; the outputs of one call go in one message.

        Outputs of attempts that have had their Finish, or whose link has gone, are dropped.
        """
        for output in outputs:
            link = self._owners.get(output.attempt)
            if link is None:
                continue
            link.pending.append(output)
            link.wake.set()
            if output.finish is not None:
                self._disown(output.attempt)

    def fail(self, attempt: AttemptId, error: BaseException) -> None:
        """Report that the attempt has ended with `error`."""
        self.report((_failed(attempt, error),))

    def load_changed(self) -> None:
        """Blocks came free or were taken without any output: conductors hear of it too."""
        for link in self._links:
            link.wake.set()

    # -- shutdown ------------------------------------------------------------------------------

    def drain(self) -> None:
        """Refuse new attempts from now on, with an error that makes conductors use others."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return when no attempt is left. The caller has the deadline."""
        await self._idle.wait()

    def abandon(self, error: BatonError) -> None:
        """End every attempt with `error`, and cancel the work for it."""
        for attempt in tuple(self._owners):
            self.fail(attempt, error)
            self._duty.cancel(attempt, error.message)

    async def aclose(self) -> None:
        """Send what is left and end all links."""
        links = tuple(self._links)
        await asyncio.gather(*(self._close(link) for link in links))

    # -- serving -------------------------------------------------------------------------------

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        link = _Link(stream)
        link.news = self._news.subscribe() if self._news is not None else None
        self._links.add(link)
        link.wake.set()  # the first report tells the load
        writer = asyncio.create_task(self._write(link), name="link-writer")
        try:
            while True:
                self._handle(link, await stream.receive())
        except PeerGone as error:
            log.info("a conductor's link ended: %s", error.message)
        finally:
            self._links.discard(link)
            if link.news is not None:
                link.news.close()
            for attempt in tuple(link.attempts):
                self._disown(attempt)
                self._duty.cancel(attempt, "the link to the conductor ended")
            writer.cancel()
            await asyncio.wait([writer])
            await stream.aclose()

    def _handle(self, link: _Link, message: ConductorMessage) -> None:
        match message:
            case StartPrefill() | StartDecode():
                self._start(link, message)
            case Cancel(attempt, reason):
                if self._owners.get(attempt) is link:
                    self._duty.cancel(attempt, reason)
            case Drain():
                self.drain()
            case Resync():
                if link.news is not None:
                    link.news.resync()
                    link.wake.set()

    def _start(self, link: _Link, message: StartPrefill | StartDecode) -> None:
        attempt = message.task.attempt
        try:
            self._own(attempt, link)
        except BatonError as error:
            link.pending.append(_failed(attempt, error))
            link.wake.set()
            return
        try:
            self._duty.start(message)
        except BatonError as error:
            self.fail(attempt, error)
        except Exception as error:
            log.exception("attempt %s could not be started", attempt)
            self.fail(attempt, error)

    def _own(self, attempt: AttemptId, link: _Link) -> None:
        """Raises when the attempt may not start here. A newer attempt ends an older one."""
        if self._draining:
            raise Overloaded("this worker is shutting down: use another one")
        current = self._current.get(attempt.request_id)
        if current is not None and current.number >= attempt.number:
            raise StaleAttempt(f"{attempt} is stale: this worker works on {current}")
        if current is not None:
            error = StaleAttempt(f"{current} was replaced by {attempt}")
            self.fail(current, error)
            self._duty.cancel(current, error.message)
        self._owners[attempt] = link
        self._current[attempt.request_id] = attempt
        link.attempts.add(attempt)
        self._idle.clear()

    def _disown(self, attempt: AttemptId) -> None:
        self._owners.pop(attempt).attempts.discard(attempt)
        del self._current[attempt.request_id]
        if not self._owners:
            self._idle.set()

    async def _write(self, link: _Link) -> None:
        try:
            while True:
                await link.wake.wait()
                link.wake.clear()
                await self._send_pending(link)
        except PeerGone:
            return  # the reader of this link sees the same and ends it
        except Exception:  # silence would leave its requests waiting for their deadlines
            log.exception("a report could not be sent: the link is closed")
            await link.stream.aclose()

    async def _send_pending(self, link: _Link) -> None:
        async with link.sending:  # at the end there are two senders: none overtakes the other
            load = self._load()
            if link.pending or load != link.said:
                outputs, link.pending = tuple(link.pending), []
                link.said = load
                await link.stream.send(StepReport(outputs, load))
            if link.news is not None:  # after the tokens, for which somebody waits
                for message in link.news.take():
                    await link.stream.send(message)

    async def _close(self, link: _Link) -> None:
        try:
            async with asyncio.timeout(LAST_REPORT_S):
                await self._send_pending(link)
        except (PeerGone, TimeoutError) as error:
            log.info("a link was closed before everything was said: %s", error)
        await link.stream.aclose()


def _failed(attempt: AttemptId, error: BaseException) -> AttemptOutput:
    return AttemptOutput(attempt, finish=Finish(FinishReason.ERROR, to_wire(error)))
