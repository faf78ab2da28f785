"""One stream to one worker, and the attempts that run over it.

    post -> outbox -> writer -> worker          worker -> reader -> the attempt's listener

`post` never waits: starting and cancelling must work from any place, also while a request is being
cancelled itself. The outbox stays small because admission bounds the attempts.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from baton.errors import PeerGone, WorkerLost
from baton.rpc.services import Duplex
from baton.types.fleet import Role
from baton.types.kv_events import KvEvents, KvSnapshot
from baton.types.link import Cancel, ConductorMessage, FetchPart, StepReport, WorkerMessage
from baton.types.request import AttemptId, AttemptOutput, Finish
from conductor.backlog import Backlog, PromptQueue

SEND_TIMEOUT_S = 5.0
SETTLE_S = 30.0  # how long a cancelled attempt's last words are waited for

log = logging.getLogger(__name__)


class Stage(StrEnum):
    """How far a worker has come with an attempt, as far as its link can tell."""

    QUEUED = "queued"  # behind other prompts, or it waits for KV
    COMPUTING = "computing"  # its prompt is next, or being computed
    ANSWERING = "answering"  # it has sent tokens


class Listener(Protocol):
    """Who hears about an attempt. `duty` is what the worker does for it."""

    def on_output(self, duty: Role, worker: str, output: AttemptOutput) -> None: ...

    def on_lost(
        self, duty: Role, worker: str, attempt: AttemptId, stage: Stage, reason: str
    ) -> None: ...


@dataclass(slots=True)
class Assignment:
    """`prompt_tokens` are those that this worker gets the KV of, by computing it or by fetching; 0
    when another worker does. That is predicted to take `work_s`. When the attempt is `resumed`,
    they include answer tokens."""

    duty: Role
    listener: Listener
    prompt_tokens: int
    work_s: float = 0.0
    priority: int = 0
    slack_s: float = 0.0
    fetch: tuple[FetchPart, ...] = ()
    resumed: bool = False
    answered: bool = False  # the link's: tokens have come
    cancelled_at: float | None = None  # the link's
    cancelled_in: Stage = Stage.QUEUED  # the link's


class Watcher(Protocol):
    """Who hears what concerns the worker as a whole."""

    def on_report(self, report: StepReport) -> None: ...

    def on_kv(self, message: KvEvents | KvSnapshot) -> None: ...

    def on_finish(self, held: Assignment, finish: Finish) -> None:
        """An attempt that was not given up has ended."""

    def on_change(self) -> None:
        """Attempts or prompts have become more or fewer."""


class Link:
    """Owned by the fleet, which awaits `run`."""

    def __init__(
        self,
        worker: str,
        stream: Duplex[ConductorMessage, WorkerMessage],
        watcher: Watcher,
    ) -> None:
        self._worker = worker
        self._stream = stream
        self._watcher = watcher
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[ConductorMessage] = asyncio.Queue()
        self._assignments: dict[AttemptId, Assignment] = {}
        self._farewell = "the conductor closed the link"
        self.attempts = 0  # neither finished nor cancelled
        self.decoding = 0  # of these: it decodes them, and has sent tokens
        self._prompts = PromptQueue()  # of those; until the first token
        self.ended = False  # nothing may be started any more
        self.orphans: tuple[AttemptId, ...] = ()  # at its end: those that may still be decoded

    def start(self, attempt: AttemptId, assignment: Assignment, message: ConductorMessage) -> None:
        """Hand an attempt to the worker; its listener hears of it until its Finish or the loss.

        Raises WorkerLost when the link has ended.
        """
        if self.ended:
            raise WorkerLost(f"worker {self._worker} has just gone: try again")
        if attempt in self._assignments and self._assignments[attempt].cancelled_at is None:
            self._uncount(attempt, self._assignments[attempt])  # adopted by ourselves
        self._assignments[attempt] = assignment
        self.attempts += 1
        if assignment.prompt_tokens:
            now = self._loop.time()
            self._prompts.add(
                attempt,
                assignment.prompt_tokens,
                assignment.work_s,
                (assignment.priority, now + assignment.slack_s),
                now,
            )
        self._outbox.put_nowait(message)
        self._watcher.on_change()

    def cancel(self, attempt: AttemptId, reason: str) -> None:
        """Tell the worker to stop, unless it has finished. What it still says is passed on."""
        held = self._assignments.get(attempt)
        if held is not None and held.cancelled_at is None:
            held.cancelled_in = self._stage(attempt, held)
            held.cancelled_at = self._loop.time()
            self._uncount(attempt, held)
            self._outbox.put_nowait(Cancel(attempt, reason))

    def post(self, message: ConductorMessage) -> None:
        """Say something that concerns no attempt. Lost when the link has ended."""
        if not self.ended:
            self._outbox.put_nowait(message)

    def say_why(self, reason: str) -> None:
        """What listeners are told when `run` is cancelled."""
        self._farewell = reason

    def sweep(self, now: float) -> None:
        """Forget cancelled attempts of which nothing more was heard."""
        for attempt, held in list(self._assignments.items()):
            if held.cancelled_at is not None and now - held.cancelled_at > SETTLE_S:
                del self._assignments[attempt]

    async def run(self) -> str:
        """Move messages until the stream ends; tell every listener; return why it ended."""
        reason: str | None = None
        writer = asyncio.create_task(self._write(), name=f"link-writer {self._worker}")
        try:
            reason = await self._read()
        finally:
            writer.cancel()
            self._lose(reason or self._farewell)
            await asyncio.wait([writer])
            await self._stream.aclose()
        return reason

    def backlog(self) -> Backlog:
        return self._prompts.snapshot(self._loop.time())

    def _uncount(self, attempt: AttemptId, held: Assignment) -> None:
        self.attempts -= 1
        self.decoding -= held.answered and held.duty is Role.DECODE
        self._prompts.done(attempt, self._loop.time())
        self._watcher.on_change()

    def _stage(self, attempt: AttemptId, held: Assignment) -> Stage:
        if held.cancelled_at is not None:
            return held.cancelled_in
        if held.answered:
            return Stage.ANSWERING
        begun = held.prompt_tokens > 0 and self._prompts.has_begun(attempt)
        return Stage.COMPUTING if begun else Stage.QUEUED

    def _lose(self, reason: str) -> None:
        self.ended = True
        assignments, self._assignments = self._assignments, {}
        stages = [self._stage(attempt, held) for attempt, held in assignments.items()]
        self.orphans = tuple(a for a, held in assignments.items() if held.duty is Role.DECODE)
        self.attempts = self.decoding = 0
        self._prompts.clear()
        self._watcher.on_change()
        for (attempt, held), stage in zip(assignments.items(), stages, strict=True):
            held.listener.on_lost(held.duty, self._worker, attempt, stage, reason)

    async def _read(self) -> str:
        # No deadline of its own: the fleet ends the link when the worker's lease runs out.
        try:
            while True:
                message = await self._stream.receive()
                if not isinstance(message, StepReport):
                    self._watcher.on_kv(message)
                    continue
                for output in message.outputs:
                    self._deliver(output)
                self._watcher.on_report(message)
        except PeerGone as error:
            return error.message
        except Exception:  # of one worker, and no reason to end for all the others
            log.exception("what worker %s said could not be dealt with", self._worker)
            return "the conductor could not deal with what the worker said"

    def _deliver(self, output: AttemptOutput) -> None:
        held = self._assignments.get(output.attempt)
        if held is None:
            return  # finished or forgotten: a stale message
        if output.tokens and not held.answered:
            held.answered = True
            self.decoding += held.duty is Role.DECODE and held.cancelled_at is None
        if output.finish is not None:
            del self._assignments[output.attempt]
            if held.cancelled_at is None:
                self._uncount(output.attempt, held)
                self._watcher.on_finish(held, output.finish)
        elif self._prompts.tokens and held.prompt_tokens and output.tokens:
            self._prompts.done(output.attempt, self._loop.time())
        held.listener.on_output(held.duty, self._worker, output)

    async def _write(self) -> None:
        try:
            while True:
                message = await self._outbox.get()
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._stream.send(message)
        except Exception as error:
            if not isinstance(error, (PeerGone, TimeoutError)):
                log.exception("a message could not be sent to worker %s", self._worker)
            await self._stream.aclose()  # the reader sees the end and reports it
