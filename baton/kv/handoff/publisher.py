"""The prefill side of the handoff: publish ranges under a lease, free them at the ending.

            expect / first publish                    Release, complete, digests equal
    (nothing) ----------> known --------> leased ---------------------------------> RELEASED
        |                   ^   publish     |  Renew: deadline moves     no renewal -> EXPIRED
        '-> attach only ----'               |      Abort or broken stream ---------> ABORTED
            (times out)                     '-- finished, failed, stale, digest ---> REFUSED

An attempt that this worker works on ends exactly once. Everything happens on the event loop, in
callbacks and message handlers that do not await, so that no state is ever seen half changed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from baton.counts import Counts
from baton.errors import (
    BatonError,
    InternalError,
    InvalidRequest,
    PeerGone,
    StaleAttempt,
)
from baton.kv.digest import cells_of, combine
from baton.kv.handoff.figures import HandoffFigures
from baton.kv.handoff.leases import Deadlines, Ending, History, Lease
from baton.kv.handoff.line import DigestLine
from baton.kv.handoff.options import HandoffOptions, check_hello
from baton.kv.identity import Identity, life
from baton.kv.transport.base import PoolMemory, Transport
from baton.logs import traced
from baton.rpc.errors import to_wire
from baton.rpc.services import Duplex
from baton.types.handoff import (
    Abort,
    Attach,
    DecodeMessage,
    Expired,
    Hello,
    Prefilled,
    PrefillMessage,
    Ranges,
    Refused,
    Release,
    Released,
    Renew,
)
from baton.types.request import AttemptId, SampledToken, WireError
from baton.types.trace import TraceContext

log = logging.getLogger(__name__)

DecodeStream = Duplex[PrefillMessage, DecodeMessage]


@dataclass(slots=True, eq=False)
class _Pair:
    """One stream from one decode worker. `key` is empty before its Hello."""

    stream: DecodeStream
    key: str = ""
    outbox: asyncio.Queue[PrefillMessage] = field(default_factory=asyncio.Queue)
    attempts: set[AttemptId] = field(default_factory=set)


class HandoffPublisher:
    """`release` gives an attempt's blocks back (Engine.release; called only if it had published);
    `on_end` then says how the attempt ended. Both are called on the event loop and must not raise.
    After any ending but RELEASED, the owner stops work that still runs for the attempt.
    """

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        memory: PoolMemory,
        release: Callable[[AttemptId], None],
        on_end: Callable[[AttemptId, Ending], None],
        options: HandoffOptions,
        figures: HandoffFigures | None = None,
    ) -> None:
        self._identity = identity
        self._transport = transport
        self._release = release
        self._on_end = on_end
        self._options = options
        self._figures = figures or HandoffFigures(Counts())
        self._leases: dict[AttemptId, Lease[_Pair]] = {}
        self._pairs: dict[str, _Pair] = {}
        self._deadlines = Deadlines()
        self._history = History()
        self._wake = asyncio.Event()
        self._line = DigestLine(memory, identity.layout, options, self._is_live, self._say)

    # -- called by the worker ------------------------------------------------------------------

    def expect(self, attempt: AttemptId) -> None:
        """This worker has started on `attempt`; from now on it gets an ending."""
        self._known(attempt)

    def publish(
        self,
        attempt: AttemptId,
        first_block: int,
        blocks: tuple[int, ...],
        layer_begin: int,
        layer_end: int,
    ) -> None:
        """Final KV: layers [layer_begin, layer_end) of `blocks`. The first call starts the lease.

        Ignored after the attempt's ending (the engine may be a step behind).
        """
        lease = self._known(attempt)
        if lease is None:
            return
        if not lease.published:
            lease.published = True
            self._renew(lease)
        self._line.put(lease, Ranges(attempt, first_block, blocks, layer_begin, layer_end, ()))

    def prefilled(
        self, attempt: AttemptId, first: SampledToken, num_blocks: int, cached_tokens: int = 0
    ) -> None:
        """Everything has been published. For an attempt that has ended meanwhile, the blocks that
        the engine has just leased are released again."""
        lease = self._known(attempt)
        if lease is None:
            self._release(attempt)
            return
        lease.complete = True
        self._line.put(lease, Prefilled(attempt, first, num_blocks, cached_tokens))

    def finish_without_handoff(self, attempt: AttemptId, error: WireError) -> None:
        """The attempt will not be handed over: its first token ended the answer (code "finished"),
        it failed or it was cancelled. Ends it as REFUSED; harmless after an ending."""
        lease = self._known(attempt)
        if lease is not None:
            self._end(lease, Ending.REFUSED, Refused(attempt, error))

    def live(self) -> tuple[AttemptId, ...]:
        """Attempts without an ending so far."""
        return tuple(self._leases)

    def check_integrity(self) -> None:
        """Raises InternalError when leases and streams disagree. Cheap; call it when idle."""
        for attempt, lease in self._leases.items():
            if self._history.ending(attempt) is not None:
                raise InternalError(f"{attempt} has ended and still holds a lease")
            if lease.pair is not None and attempt not in lease.pair.attempts:
                raise InternalError(f"{attempt} is attached to a stream that does not know it")
            if lease.published and lease.deadline is None:
                raise InternalError(f"{attempt} is published without a deadline")
        attached = {a for pair in self._pairs.values() for a in pair.attempts}
        if unknown := attached - self._leases.keys():
            raise InternalError(f"a stream still lists attempts that have ended: {unknown}")

    # -- tasks ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Digest what is long, end leases that are not renewed. Owned by the process; runs until
        cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._line.run(), name="digests")
            await self._end_overdue()

    async def _end_overdue(self) -> None:
        while True:
            now = self._now()
            while (attempt := self._deadlines.pop_due(now)) is not None:
                self._check_deadline(attempt, now)
            self._wake.clear()
            upcoming = self._deadlines.next()
            try:
                async with asyncio.timeout_at(upcoming):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def serve(self, stream: DecodeStream) -> None:
        """Serve one decode worker until its stream ends; then free all that it had attached."""
        pair = _Pair(stream)
        try:
            if await self._greet(pair):
                await self._serve(pair)
        except (PeerGone, TimeoutError):
            return
        finally:
            if self._pairs.get(pair.key) is pair:  # else the same worker has dialled again
                del self._pairs[pair.key]
                await self._transport.disconnect(pair.key)
            await stream.aclose()

    async def _greet(self, pair: _Pair) -> bool:
        """Exchange Hellos. False when the stream was refused."""
        stream = pair.stream
        async with asyncio.timeout(self._options.hello_timeout_s):
            hello = await stream.receive()
            try:
                if not isinstance(hello, Hello):
                    raise InvalidRequest(f"a handoff stream begins with Hello, not {hello!r}")
                self._check(hello)
                pair.key = life(hello.worker, hello.incarnation)
                # First: an older stream that ends from here on must leave the connection alone.
                self._pairs[pair.key] = pair
                await self._transport.connect(pair.key, hello.endpoint)
            except BatonError as error:
                await stream.send(Refused(None, to_wire(error)))
                return False
            us = self._identity
            await stream.send(
                Hello(
                    us.name,
                    us.incarnation,
                    us.layout,
                    self._transport.name,
                    self._transport.endpoint(),
                    self._options.lease_ttl_s,
                )
            )
        return True

    def _check(self, hello: Hello) -> None:
        us = self._identity
        if hello.expected_incarnation != us.incarnation:
            raise PeerGone(  # that life has: the request may be tried again
                f"{hello.worker} looks for life {hello.expected_incarnation} of {us.name}, but "
                f"this is life {us.incarnation}: the worker was restarted"
            )
        check_hello(us, self._transport.name, hello)

    async def _serve(self, pair: _Pair) -> None:
        sender = asyncio.create_task(_send_all(pair), name=f"handoff sender to {pair.key}")
        try:
            while True:
                self._handle(pair, await pair.stream.receive())
        finally:
            for attempt in list(pair.attempts):
                self._end(self._leases[attempt], Ending.ABORTED, None)
            sender.cancel()
            await asyncio.wait([sender])

    # -- messages ------------------------------------------------------------------------------

    def _handle(self, pair: _Pair, message: DecodeMessage) -> None:
        match message:
            case Attach(attempt, trace):
                self._attach(pair, attempt, trace)
            case Renew(attempts):
                for attempt in attempts:
                    if (lease := self._attached(pair, attempt)) and lease.published:
                        self._renew(lease)
            case Release(attempt, digest):
                if lease := self._attached(pair, attempt):
                    self._released(lease, digest)
            case Abort(attempt):
                if lease := self._attached(pair, attempt):
                    self._end(lease, Ending.ABORTED, None)
            case Hello():
                raise PeerGone(f"{pair.key} said Hello twice")

    def _attach(self, pair: _Pair, attempt: AttemptId, trace: TraceContext | None) -> None:
        lease = self._leases.get(attempt)
        try:
            self._check_current(attempt)
            if (ending := self._history.ending(attempt)) is not None:
                how, last = ending
                stale = StaleAttempt(f"{attempt} has ended on {self._identity.name}: {how}")
                pair.outbox.put_nowait(last or Refused(attempt, to_wire(stale)))
                return
            if lease is not None and lease.pair is not None and lease.pair is not pair:
                raise StaleAttempt(f"{attempt} is attached to {lease.pair.key} already")
        except StaleAttempt as error:
            pair.outbox.put_nowait(Refused(attempt, to_wire(error)))
            return
        if lease is None:
            lease = self._leases[attempt] = Lease(attempt)
            self._set_deadline(lease, self._options.attach_timeout_s)
        if lease.pair is pair:
            return
        lease.pair, lease.trace = pair, trace
        pair.attempts.add(attempt)
        lease.serving.enter_context(self._transport.serving(pair.key))
        if lease.published:
            self._renew(lease)
        for said in lease.backlog:
            pair.outbox.put_nowait(said)
        lease.backlog.clear()

    def _released(self, lease: Lease[_Pair], digest: bytes) -> None:
        attempt = lease.attempt
        if not lease.complete:
            error = to_wire(InvalidRequest(f"{attempt} was released before it was prefilled"))
            self._end(lease, Ending.REFUSED, Refused(attempt, error))
        elif digest != combine(lease.cells):
            text = f"{attempt}: the digest of what was read differs from what was published"
            error = WireError("digest_mismatch", text, retryable=True)
            self._end(lease, Ending.REFUSED, Refused(attempt, error))
        else:
            self._end(lease, Ending.RELEASED, Released(attempt))

    def _attached(self, pair: _Pair, attempt: AttemptId) -> Lease[_Pair] | None:
        """The lease that `pair` speaks of, if it is still running; an overdue one ends here."""
        lease = self._leases.get(attempt)
        if lease is None or lease.pair is not pair:
            return None  # it has ended, and the stream carries the answer already
        if lease.deadline is not None and lease.deadline <= self._now():
            self._expire(lease)
            return None
        return lease

    # -- leases --------------------------------------------------------------------------------

    def _known(self, attempt: AttemptId) -> Lease[_Pair] | None:
        """The lease of an attempt that this worker works on; None when it has ended."""
        lease = self._leases.get(attempt)
        if lease is not None and lease.expected:
            return lease
        if self._history.ending(attempt) is not None:
            return None
        if lease is None:
            lease = self._leases[attempt] = Lease(attempt)
        lease.expected = True
        lease.deadline = None  # the attach has met its attempt
        try:
            self._check_current(attempt)
        except StaleAttempt as error:
            self._end(lease, Ending.REFUSED, Refused(attempt, to_wire(error)))
            return None
        return lease

    def _check_current(self, attempt: AttemptId) -> None:
        """Raises StaleAttempt; ends the older attempt of the request when this one is newer."""
        newest = self._history.note(attempt)
        if newest is None or newest == attempt.number:
            return
        if newest > attempt.number:
            raise StaleAttempt(
                f"{attempt} is stale on {self._identity.name}: number {newest} is known"
            )
        older = self._leases.get(AttemptId(attempt.request_id, newest))
        if older is not None:  # at most this one: those before it were replaced by it
            error = StaleAttempt(f"{older.attempt} was replaced by {attempt}")
            self._end(older, Ending.REFUSED, Refused(older.attempt, to_wire(error)))

    def _is_live(self, lease: Lease[_Pair]) -> bool:
        return self._leases.get(lease.attempt) is lease

    def _say(self, lease: Lease[_Pair], message: PrefillMessage) -> None:
        if isinstance(message, Ranges):
            lease.cells += cells_of(message.first_block, message.layer_begin, message.digests)
        if lease.pair is not None:
            lease.pair.outbox.put_nowait(message)
        else:
            lease.backlog.append(message)

    def _renew(self, lease: Lease[_Pair]) -> None:
        """Give the lease a whole ttl. Moving an existing deadline back needs no new timer."""
        if lease.deadline is None:
            self._set_deadline(lease, self._options.lease_ttl_s)
        else:
            lease.deadline = self._now() + self._options.lease_ttl_s

    def _set_deadline(self, lease: Lease[_Pair], ttl_s: float) -> None:
        lease.deadline = self._now() + ttl_s
        if self._deadlines.push(lease.deadline, lease.attempt):
            self._wake.set()

    def _check_deadline(self, attempt: AttemptId, now: float) -> None:
        """A timer went off: the lease ends, or was renewed and gets its next timer."""
        lease = self._leases.get(attempt)
        if lease is None or lease.deadline is None:
            return
        if lease.deadline > now:
            self._deadlines.push(lease.deadline, attempt)
        else:
            self._expire(lease)

    def _expire(self, lease: Lease[_Pair]) -> None:
        attempt = lease.attempt
        if lease.expected:
            self._end(lease, Ending.EXPIRED, Expired(attempt))
        else:
            # Not the request's deadline: another worker may well have the time.
            gone = PeerGone(f"{attempt} did not reach {self._identity.name} in time")
            self._end(lease, Ending.EXPIRED, Refused(attempt, to_wire(gone)))

    def _end(self, lease: Lease[_Pair], how: Ending, last: PrefillMessage | None) -> None:
        attempt = lease.attempt
        with traced(lease.trace):
            log.debug("the handoff of %s ends: %s", attempt, how)
        del self._leases[attempt]
        if how is Ending.RELEASED:
            lease.serving.close()
        else:  # the reader's transfers may still run, and over TCP end only with our progress
            loop = asyncio.get_running_loop()
            loop.call_later(self._options.linger_s, lease.serving.close)
        if lease.pair is not None:
            lease.pair.attempts.discard(attempt)
            if last is not None:
                lease.pair.outbox.put_nowait(last)
        if not lease.expected:
            return  # nobody here works on it: nothing to free, and it may still arrive
        self._figures.leases.add(how)
        self._history.ended(attempt, how, None if how is Ending.RELEASED else last)
        if lease.published:
            self._release(attempt)
        self._on_end(attempt, how)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


async def _send_all(pair: _Pair) -> None:
    try:
        while True:
            await pair.stream.send(await pair.outbox.get())
    except PeerGone:
        return  # the receiving side notices too and ends the pair
    except Exception:
        log.exception("a message could not be sent to %s: the stream is closed", pair.key)
        await pair.stream.aclose()
