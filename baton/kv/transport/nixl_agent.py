"""One thread that owns a NIXL agent, and moves transfers forward only while there are any.

    event loop                       agent thread
    read() --- job ----------------> post slices, check them, release their handles
    wait() <-- call_soon_threadsafe - every slice done or failed
    serving() - count -------------> get_new_notifs every millisecond
                                     nothing to do: asleep on an event, no CPU

Why a thread: an agent is not thread-safe; UCX over CMA copies inside `transfer`, which
would stop the event loop for the length of the copy (the binding lets go of the interpreter lock
meanwhile). Why not NIXL's own progress thread: it spins, also in idle workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from baton.errors import TransportError
from baton.kv.transport.transfer import PendingTransfer

T = TypeVar("T")

IN_FLIGHT = 64 << 20  # bytes posted per peer and not finished; enough for a 400 Gbit/s link
STALL_S = 60.0  # a read without any progress for this long has failed
SERVE_S = 0.001  # how often a source makes progress for its readers
FINE_S, COARSE_S = 0.00002, 0.005  # shortest and longest pause between two looks at transfers
EAGER_S = 1.0  # pauses stay below half a millisecond for this long without progress

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """A transfer cut into slices; `post` gives an initialized NIXL handle for each."""

    transfer: PendingTransfer
    slices: Iterator[tuple[Callable[[], Any], int]]  # (handle maker, bytes)
    posted: int = 0  # handles that are not released yet
    exhausted: bool = False
    error: TransportError | None = None
    moved_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Posted:
    job: Job
    handle: Any
    nbytes: int


class AgentThread:
    """`start` makes the agent, `stop` destroys it; both on the thread, like every use of it."""

    def __init__(self, agent_name: str) -> None:
        self.agent_name = agent_name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._stopping = False
        self._calls: deque[Callable[[], None]] = deque()
        self._jobs: list[Job] = []  # oldest first; like all below, used on the thread only
        self._posted: list[_Posted] = []
        self._in_flight: Counter[str] = Counter()  # bytes, by peer
        self._served = 0
        self._idle_since = 0.0
        self._pause_s = FINE_S
        self._agent: Any = None

    async def start(self, make_agent: Callable[[], Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"nixl {self.agent_name}")
        self._thread.daemon = True  # a stuck driver call must not keep a dying process alive
        self._thread.start()

        def create() -> None:
            self._agent = make_agent()

        await asyncio.wrap_future(self.call(create))

    async def stop(self) -> None:
        """End the thread. Transfers must have ended; what has not is left behind with the agent."""
        if self._thread is None:
            return
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, 5.0)
        self._thread = None

    @property
    def agent(self) -> Any:
        """Only for use inside `call` and slices."""
        return self._agent

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` on the thread, between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.append(run)
        self._wake.set()
        return future

    def submit(self, job: Job) -> None:
        self._calls.append(partial(self._jobs.append, job))
        self._wake.set()

    def serve(self, change: int) -> None:
        """Add to the number of reasons to make progress for others. On the event loop only."""
        self._served += change
        self._wake.set()

    def kick(self) -> None:
        """Look at `stopped` flags now."""
        self._wake.set()

    # -- on the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            while self._calls:
                self._calls.popleft()()
            moved = self._post() | self._check()
            if self._served and self._agent is not None:
                self._progress()
            self._rest(moved)
        self._agent = None  # destroyed where it was used

    def _progress(self) -> None:
        try:
            self._agent.get_new_notifs()
        except Exception as error:  # a peer that went away; its own side notices
            _log.debug("NIXL progress failed: %s", error)

    def _rest(self, moved: bool) -> None:
        """Sleep until something may have happened: longer and longer without progress."""
        now = time.monotonic()
        if moved:
            self._idle_since, self._pause_s = now, FINE_S
            return
        if self._posted:
            ceiling = SERVE_S / 2 if now - self._idle_since < EAGER_S else COARSE_S
            self._pause_s = min(self._pause_s * 2, ceiling)
            self._wake.wait(self._pause_s)
        elif self._served:
            self._wake.wait(SERVE_S)
        elif not (self._calls or self._jobs or self._stopping):  # else a wake-up was just cleared
            self._wake.wait()

    def _post(self) -> bool:
        """Post one slice of the oldest job whose peer has room (a peer that stands still holds up
        no other); a step stays short that way."""
        job = next((job for job in self._jobs if self._has_room(job)), None)
        if job is None:
            return False
        try:
            piece = None if job.error or job.transfer.stopped else next(job.slices, None)
            if piece is None:
                self._jobs.remove(job)
                job.exhausted = True
                self._conclude(job)
                return True
            make, nbytes = piece
            handle = make()
            state = self._agent.transfer(handle)
        except Exception as error:
            self._fail(job, error)  # the next look at the job takes it off the queue
            return True
        if not job.posted:
            job.moved_at = time.monotonic()  # the time in the queue is not a stall
        job.posted += 1
        self._in_flight[job.transfer.peer] += nbytes
        posted = _Posted(job, handle, nbytes)
        if state == "PROC":
            self._posted.append(posted)
        else:
            self._done(posted, state)
        return True

    def _has_room(self, job: Job) -> bool:
        """Also for one that has nothing more to post: it has to be concluded."""
        ended = job.error is not None or job.transfer.stopped
        return ended or self._in_flight[job.transfer.peer] < IN_FLIGHT

    def _check(self) -> bool:
        """Ask for the state of what is posted. This is also what makes UCX progress."""
        unfinished = []
        for posted in self._posted:
            try:
                state = self._agent.check_xfer_state(posted.handle)
            except Exception as error:
                state = "ERR"
                self._fail(posted.job, error)
            if state == "PROC":
                unfinished.append(posted)
                self._check_stall(posted.job)
            else:
                self._done(posted, state)
        moved = len(unfinished) < len(self._posted)
        self._posted = unfinished
        return moved

    def _done(self, posted: _Posted, state: str) -> None:
        job = posted.job
        if state != "DONE":
            self._fail(job, "NIXL reported an error")
        try:
            posted.handle.release()
        except Exception as error:  # the transfer has ended all the same
            _log.debug("a NIXL handle could not be released: %s", error)
        job.posted -= 1
        job.moved_at = time.monotonic()
        self._in_flight[job.transfer.peer] -= posted.nbytes
        if not self._in_flight[job.transfer.peer]:
            del self._in_flight[job.transfer.peer]
        self._conclude(job)

    def _check_stall(self, job: Job) -> None:
        if job.error is None and time.monotonic() - job.moved_at > STALL_S:
            self._fail(job, f"no progress for {STALL_S:g} s")
            self._notify(job.transfer.settle, job.error)

    def _fail(self, job: Job, why: object) -> None:
        if job.error is None:
            job.error = TransportError(f"read from {job.transfer.peer} failed: {why}")

    def _conclude(self, job: Job) -> None:
        """Memory is idle once no slice is posted and none will be."""
        if job.posted or not job.exhausted:
            return
        error = job.error
        if error is None and job.transfer.stopped:
            error = TransportError(f"the read from {job.transfer.peer} was aborted")
        self._notify(job.transfer.end, error)

    def _notify(
        self, tell: Callable[[TransportError | None], None], error: TransportError | None
    ) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
                self._loop.call_soon_threadsafe(tell, error)
