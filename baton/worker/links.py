"""The worker's end of the links: who began which attempt, and what each conductor is told.

    conductor --Start/Adopt/Cancel--> LinkServer --> Duty (prefill or decode) --> Engine
    conductor <--StepReport---------- LinkServer <-- report(outputs of one step)

Always true: an attempt belongs to at most one link at a time, and ends with one Finish. When a link
ends, what has not begun to decode is cancelled. What decodes is *orphaned*: it goes on for
`orphan_timeout_s`, so that another conductor can adopt it with all its tokens, and is cancelled
then. An answer that has ended can be adopted, too, for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from baton.counts import Buckets
from baton.errors import (
    BatonError,
    PeerGone,
    StaleAttempt,
    TakenOver,
    UnknownAttempt,
    WorkerLost,
)
from baton.logs import traced
from baton.rpc.errors import to_wire
from baton.rpc.services import Duplex
from baton.types.fleet import Role, WorkerLoad
from baton.types.link import (
    Adopt,
    Cancel,
    ConductorMessage,
    Drain,
    Resync,
    SetRole,
    StartDecode,
    StartPrefill,
    StepReport,
    WorkerMessage,
)
from baton.types.request import AttemptId, AttemptOutput, Finish, FinishReason, SampledToken
from baton.types.trace import TraceContext
from baton.worker.kv_news import KvNews, Subscription
from baton.worker.tails import EndedTails, Tail

log = logging.getLogger(__name__)

ORPHAN_S = 15.0  # how long nobody may have an attempt that decodes
OTHERS_S = 0.1  # until conductors hear what attempts of others did to load and blocks
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
    attempts: dict[AttemptId, None] = field(default_factory=dict)  # in the order of their starts
    pending: list[AttemptOutput] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)
    said: WorkerLoad | None = None  # the load in the last report
    news: Subscription | None = None
    since: float | None = None  # when there came something to send

    def tell(self, output: AttemptOutput) -> None:
        self.pending.append(output)
        self.stir()

    def stir(self) -> None:
        """There is, or may be, something to send."""
        if self.since is None:
            self.since = asyncio.get_running_loop().time()
        self.wake.set()


@dataclass(slots=True, eq=False)
class _Held:
    """An attempt that this worker works on."""

    attempt: AttemptId
    link: _Link | None  # None: orphaned, until `timer` ends it
    tail: Tail | None  # None: it is not to be decoded here
    trace: TraceContext | None = None
    timer: asyncio.TimerHandle | None = None


class LinkServer:
    """Implements WorkerService. `load` is asked once per report; `news` is what is to be told of KV
    blocks."""

    def __init__(
        self,
        duty: Duty,
        load: Callable[[], WorkerLoad],
        news: KvNews | None = None,
        orphan_timeout_s: float = ORPHAN_S,
        news_lag: Buckets | None = None,
    ) -> None:
        self._duty = duty
        self._load = load
        self._news = news
        self._orphan_timeout_s = orphan_timeout_s
        self._news_lag = news_lag
        self._links: list[_Link] = []
        self._held: dict[AttemptId, _Held] = {}
        self._current: dict[str, AttemptId] = {}  # request id -> its live attempt
        self._ended = EndedTails()
        self._draining = False
        self.other_roles: frozenset[Role] = frozenset()  # that this worker could have
        self.wanted_role: Role | None = None  # one of them, that a conductor asked for
        self.role_wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._others: asyncio.TimerHandle | None = None

    # -- what the worker calls -----------------------------------------------------------------

    def report(self, outputs: tuple[AttemptOutput, ...]) -> None:
        """Tell each conductor about its attempts; the outputs of one call go in one message.

        Outputs of attempts that have had their Finish, or were cancelled, are dropped. What they
        did to load and blocks is told all the same, and a little later to other conductors.
        """
        for output in outputs:
            held = self._held.get(output.attempt)
            if held is None or held.link is None:
                self.load_changed()
            if held is None:
                continue
            if held.tail is not None:
                held.tail.add(output.tokens)
            if held.link is not None:
                held.link.tell(output)
            if output.finish is not None:
                self._let_go(held, output.finish)
        if len(self._links) > 1 and self._others is None:
            loop = asyncio.get_running_loop()
            self._others = loop.call_later(OTHERS_S, self._tell_others)

    def begun(self, attempt: AttemptId, first: SampledToken) -> None:
        """The attempt decodes from now on, after `first`, which comes from the prefill worker."""
        held = self._held.get(attempt)
        if held is not None and held.tail is not None:
            held.tail.add((first,))

    def fail(self, attempt: AttemptId, error: BaseException) -> None:
        """Report that the attempt has ended with `error`."""
        self.report((_failed(attempt, error),))

    def load_changed(self) -> None:
        """Blocks came free or were taken without any output: conductors hear of it too."""
        for link in self._links:
            link.stir()

    def _tell_others(self) -> None:
        self._others = None
        self.load_changed()

    @property
    def attempts(self) -> tuple[AttemptId, ...]:
        """That this worker works on now."""
        return tuple(self._held)

    @property
    def orphans(self) -> tuple[AttemptId, ...]:
        """Those of them that no conductor has now."""
        return tuple(attempt for attempt, held in self._held.items() if held.link is None)

    # -- shutdown ------------------------------------------------------------------------------

    def drain(self) -> None:
        """Refuse new attempts from now on, with an error that makes conductors use others."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return when no attempt is left. The caller has the deadline."""
        await self._idle.wait()

    def abandon_decodes(self, error: BatonError) -> None:
        """End what decodes now with `error`: it can go on behind its last token elsewhere."""
        for attempt, held in tuple(self._held.items()):
            if held.link is not None and held.tail is not None and held.tail.decodes:
                self._end(attempt, error)

    def abandon(self, error: BatonError) -> None:
        """End every attempt with `error`, and cancel the work for it."""
        for attempt in tuple(self._held):
            self._end(attempt, error)

    async def aclose(self) -> None:
        """Send what is left, end all links, and cancel what is still worked on."""
        await asyncio.gather(*(self._close(link) for link in tuple(self._links)))
        for held in tuple(self._held.values()):
            self._give_up(held)
        if self._others is not None:
            self._others.cancel()
            self._others = None

    # -- serving -------------------------------------------------------------------------------

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        link = _Link(stream)
        link.news = self._news.subscribe() if self._news is not None else None
        self._links.append(link)
        link.stir()  # the first report tells the load
        writer = asyncio.create_task(self._write(link), name="link-writer")
        try:
            while True:
                self._handle(link, await stream.receive())
        except PeerGone as error:
            log.info("a conductor's link ended: %s", error.message)
        finally:
            self._links.remove(link)
            if link.news is not None:
                link.news.close()
            for attempt in tuple(link.attempts):
                self._orphan(self._held[attempt])
            writer.cancel()
            await asyncio.wait([writer])
            await stream.aclose()

    def _handle(self, link: _Link, message: ConductorMessage) -> None:
        match message:
            case StartPrefill() | StartDecode():
                self._start(link, message)
            case Adopt(attempt):
                self._adopt(link, attempt)
            case Cancel(attempt, reason):
                self._cancel(link, attempt, reason)
            case Drain():
                self.drain()
            case SetRole(role):
                self._set_role(role)
            case Resync():
                if link.news is not None:
                    link.news.resync()
                    link.stir()

    def _set_role(self, role: Role) -> None:
        """The first conductor that asks is heard."""
        if role in self.other_roles and self.wanted_role is None:
            self.wanted_role = role
            self.role_wanted.set()

    def _start(self, link: _Link, message: StartPrefill | StartDecode) -> None:
        attempt = message.task.attempt
        try:
            self._check_new(link, attempt)
        except BatonError as error:
            link.tell(_failed(attempt, error))
            return
        tail = Tail(message.task) if isinstance(message, StartDecode) else None
        trace = message.task.trace
        self._held[attempt] = _Held(attempt, link, tail, trace)
        self._current[attempt.request_id] = attempt
        link.attempts[attempt] = None
        self._idle.clear()
        with traced(trace):  # tasks that are made for it log its id, too
            log.debug("attempt %s begins", attempt)
            try:
                self._duty.start(message)
            except BatonError as error:
                self.fail(attempt, error)
            except Exception as error:
                log.exception("attempt %s could not be started", attempt)
                self.fail(attempt, error)

    def _check_new(self, link: _Link, attempt: AttemptId) -> None:
        """Raises when the attempt may not start here. A newer attempt ends an older one."""
        if self._draining:
            # Not Overloaded, which ends a request when the same workers are all that there is.
            raise WorkerLost("this worker is shutting down: use another one")
        current = self._current.get(attempt.request_id)
        if current is not None and current.number >= attempt.number:
            raise StaleAttempt(f"{attempt} is stale: this worker works on {current}")
        if current is None:
            return
        if self._held[current].link is link:
            self._end(current, StaleAttempt(f"{current} was replaced by {attempt}"))
        else:
            self._end(
                current, TakenOver(f"{current} was replaced by another conductor's {attempt}")
            )

    def _adopt(self, link: _Link, attempt: AttemptId) -> None:
        current = self._current.get(attempt.request_id)
        held = self._held.get(attempt)
        if current is not None and current.number > attempt.number:
            link.tell(_failed(attempt, StaleAttempt(f"{attempt} was replaced by {current}")))
        elif held is not None and held.tail is not None:
            self._move(held, link)
            link.tell(AttemptOutput(attempt, held.tail.tokens()))
        else:
            unknown = UnknownAttempt(f"{attempt} is not decoded here (any more)")
            link.tell(self._ended.find(attempt) or _failed(attempt, unknown))

    def _move(self, held: _Held, link: _Link) -> None:
        """Make `link` the owner; whoever was it is told so."""
        self._unlink(held)
        if held.link is not None and held.link is not link:
            error = TakenOver(f"{held.attempt} was adopted by another conductor")
            held.link.tell(_failed(held.attempt, error))
        held.link = link
        link.attempts[held.attempt] = None

    def _cancel(self, link: _Link, attempt: AttemptId, reason: str) -> None:
        """Unless another conductor has it. Whoever knows of an orphan may end it."""
        held = self._held.get(attempt)
        if held is not None and held.link in (link, None):
            self._duty.cancel(attempt, reason)

    def _orphan(self, held: _Held) -> None:
        """Its link has ended."""
        decodes = held.tail is not None and held.tail.decodes
        if not decodes or self._orphan_timeout_s <= 0:
            self._give_up(held)
            return
        self._unlink(held)
        held.link = None
        loop = asyncio.get_running_loop()
        held.timer = loop.call_later(self._orphan_timeout_s, self._on_orphan_timeout, held.attempt)

    def _on_orphan_timeout(self, attempt: AttemptId) -> None:
        waited = f"no conductor adopted it within {self._orphan_timeout_s:g} s"
        with traced(self._held[attempt].trace):
            log.info("attempt %s is cancelled: %s", attempt, waited)
        self._end(attempt, WorkerLost(waited))

    def _end(self, attempt: AttemptId, error: BatonError) -> None:
        """Report the error, and stop working on it."""
        self.fail(attempt, error)
        self._duty.cancel(attempt, error.message)

    def _give_up(self, held: _Held) -> None:
        """Stop working on it; there is nobody to tell."""
        self._let_go(held, None)
        self._duty.cancel(held.attempt, "the link to the conductor ended")

    def _let_go(self, held: _Held, finish: Finish | None) -> None:
        with traced(held.trace):
            how = finish.reason if finish is not None else "given up"
            log.debug("attempt %s ends here: %s", held.attempt, how)
        self._unlink(held)
        del self._held[held.attempt]
        del self._current[held.attempt.request_id]
        if held.tail is not None and finish is not None and not _was_given_up(finish):
            self._ended.keep(held.attempt, held.tail, finish)
        if not self._held:
            self._idle.set()

    def _unlink(self, held: _Held) -> None:
        """It belongs to no link, and no timer runs for it."""
        if held.link is not None:
            held.link.attempts.pop(held.attempt, None)
        if held.timer is not None:
            held.timer.cancel()
            held.timer = None

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
            since, link.since = link.since, None
            load = self._load()
            if link.pending or load != link.said:
                outputs, link.pending = tuple(link.pending), []
                link.said = load
                await link.stream.send(StepReport(outputs, load))
            if link.news is not None:  # after the tokens, for which somebody waits
                news = link.news.take()
                for message in news:
                    await link.stream.send(message)
                if news and since is not None and self._news_lag is not None:
                    self._news_lag.observe(asyncio.get_running_loop().time() - since)

    async def _close(self, link: _Link) -> None:
        try:
            async with asyncio.timeout(LAST_REPORT_S):
                await self._send_pending(link)
        except (PeerGone, TimeoutError) as error:
            log.info("a link was closed before everything was said: %s", error)
        await link.stream.aclose()


def _was_given_up(finish: Finish) -> bool:
    """Cancelled, or replaced by another attempt, whose records may be older than those of this one:
    who comes for this one is to begin anew, and not to hear that somebody else has the answer."""
    replaced = (StaleAttempt.code, TakenOver.code)
    error = finish.error
    return finish.reason is FinishReason.CANCELLED or (error is not None and error.code in replaced)


def _failed(attempt: AttemptId, error: BaseException) -> AttemptOutput:
    return AttemptOutput(attempt, finish=Finish(FinishReason.ERROR, to_wire(error)))
