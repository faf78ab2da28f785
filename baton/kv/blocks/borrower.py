"""The borrowing side: find blocks by key at a peer, read them, and use them if the lease held.

    borrow:  Ask -> Lend* LendEnd -> (all read and verified) Return -> Returned -> blocks are good
                      |
                      '-> read by transport while the lender still brings the rest

A borrow that fails or is cancelled ends when no transfer can write into local memory any more:

    error --> transfers aborted, idle (at the latest when the stream is cut) --> Return --> raised
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from baton.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    LeaseExpired,
    TransportError,
)
from baton.hashing import KEY_BYTES
from baton.kv.blocks.inboxes import Inbox
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.pair import Pair
from baton.kv.blocks.reads import Lent, Reads
from baton.kv.blocks.session import Session
from baton.kv.identity import Identity
from baton.kv.settle import uninterrupted, verdict
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.shared import SharedTransport
from baton.rpc.errors import copy_of, from_wire
from baton.rpc.services import BlocksDialer
from baton.tasks import OwnedTasks
from baton.types.blocks import (
    Ask,
    BlocksRefused,
    Lend,
    LendEnd,
    LoanExpired,
    Return,
    Returned,
)
from baton.types.fleet import Peer

OnLayers = Callable[[int, int], None]
"""(blocks, layer_end): layers [0, layer_end) of the first `blocks` blocks have come."""


@dataclass(slots=True, eq=False)
class _Loan:
    number: int
    place: Sequence[int]
    session: Session
    inbox: Inbox
    reads: Reads
    layer_groups: int
    on_layers: OnLayers | None
    lent: int = 0  # blocks of which the lender has spoken
    ended: bool = False  # it has spoken of all
    asked: bool = False
    returned: bool = False  # the lender has been told that it may end the loan, or has ended it
    arrived: asyncio.Queue[Lend | LendEnd] = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class _Backoff:
    """After a peer could not be reached: when to dial again, and what to say until then."""

    error: BatonError
    delay_s: float
    until: float


class Borrower:
    """One per process that borrows. `borrow` needs `run` to be running."""

    def __init__(
        self,
        identity: Identity,
        shared: SharedTransport,
        memory: PoolMemory,
        dialer: BlocksDialer,
        options: BlocksOptions,
    ) -> None:
        self._identity = identity
        self._shared = shared
        self._memory = memory
        self._dialer = dialer
        self._options = options
        self._pairs: dict[Peer, Pair] = {}
        self._backoffs: dict[Peer, _Backoff] = {}
        self._tasks = OwnedTasks()

    async def run(self) -> None:
        """Own the streams. Runs until cancelled."""
        await self._tasks.run()

    async def borrow(
        self,
        peer: Peer,
        keys: bytes,
        place: Sequence[int],
        *,
        layer_groups: int = 1,
        on_layers: OnLayers | None = None,
        timeout_s: float,
    ) -> int:
        """Read the blocks with the chained `keys` (16 bytes each) from `peer` into the local blocks
        `place`, one for each. How many of them, from the first on, are good now: 0 when the peer
        has none.

        The blocks that are there at once are read group of layers by group of layers;
        `on_layers` tells of each, so that work on the first layers may begin, but its result must
        not leave the process before this returns: nothing is final earlier.

        Raises PeerGone, LayoutMismatch, LeaseExpired, TransportError, DigestMismatch, Overloaded,
        DeadlineExceeded, or the error with which the peer refused; then nothing in `place` is good.
        However this ends, also by cancelling it, nothing writes into `place` after it: that may
        take as long as aborting the transfers, at most `linger_s` and the cutting of the stream.
        """
        if len(keys) != KEY_BYTES * len(place):
            raise InternalError(f"{len(keys)} bytes of keys for {len(place)} blocks")
        if not place:
            return 0
        deadline = asyncio.get_running_loop().time() + timeout_s
        with ExitStack() as stack:
            loan: _Loan | None = None
            try:
                async with asyncio.timeout_at(deadline):
                    pair = self._pair(peer)
                    session = await pair.session()
                    number = next(pair.numbers)
                    inbox = stack.enter_context(pair.inboxes.open(number))
                    reads = Reads(session, self._memory, self._identity.layout, self._options)
                    loan = _Loan(number, place, session, inbox, reads, layer_groups, on_layers)
                    return await self._follow(loan, keys)
            except TimeoutError:
                text = f"{peer.name} did not lend {len(place)} blocks within {timeout_s:g} s"
                raise DeadlineExceeded(text) from None
            finally:
                if loan is not None:
                    await _close(loan)

    def streams(self) -> int:
        """To peers that have greeted."""
        return sum(pair.greeted for pair in self._pairs.values())

    # -- streams -------------------------------------------------------------------------------

    def _pair(self, peer: Peer) -> Pair:
        """The stream to this life of `peer`, dialled if need be. Raises why it is not dialled."""
        if not self._tasks.running:
            raise InternalError("Borrower.run is not running")
        pair = self._pairs.get(peer)
        if pair is None:
            backoff = self._backoffs.get(peer)
            if backoff is not None and asyncio.get_running_loop().time() < backoff.until:
                raise copy_of(backoff.error)
            pair = self._pairs[peer] = Pair(peer)
            self._tasks.begin(self._keep(pair), f"blocks stream to {peer.name}")
        return pair

    async def _keep(self, pair: Pair) -> None:
        try:
            error = await pair.run(self._identity, self._shared, self._dialer, self._options)
        finally:
            del self._pairs[pair.peer]
        self._back_off(pair, error)

    def _back_off(self, pair: Pair, error: BatonError) -> None:
        """A peer that cannot be reached is dialled less and less often; one that could is dialled
        again as soon as somebody wants something."""
        now, longest = asyncio.get_running_loop().time(), self._options.last_redial_s
        for peer in [p for p, b in self._backoffs.items() if b.until + longest < now]:
            del self._backoffs[peer]
        before = self._backoffs.pop(pair.peer, None)
        if not pair.greeted:
            delay = self._options.first_redial_s if before is None else 2 * before.delay_s
            delay = min(delay, longest)
            self._backoffs[pair.peer] = _Backoff(error, delay, now + delay)

    # -- one loan ------------------------------------------------------------------------------

    async def _follow(self, loan: _Loan, keys: bytes) -> int:
        loan.asked = True
        loan.session.say(Ask(loan.number, keys))
        try:
            async with asyncio.TaskGroup() as tasks:
                reading = tasks.create_task(_read(loan))
                await _listen(loan)
                reading.cancel()  # it is done, or there was nothing
        except BaseExceptionGroup as group:
            raise verdict(group) from None
        return loan.lent


async def _listen(loan: _Loan) -> None:
    """Until all that was lent is good, or nothing was. Raises whatever ends the loan otherwise."""
    while True:
        message = await loan.inbox.get()
        match message:
            case Lend(_, first, blocks) if not loan.ended:
                if first != loan.lent or not blocks or first + len(blocks) > len(loan.place):
                    raise TransportError(
                        f"{loan.session.key} lent blocks [{first}, {first + len(blocks)}) after "
                        f"{loan.lent} of {len(loan.place)}"
                    )
                loan.lent += len(blocks)
                loan.arrived.put_nowait(message)
            case LendEnd(_, count) if not loan.ended and count == loan.lent:
                loan.ended = True
                if not count:
                    loan.returned = True  # by nature
                    return
                loan.arrived.put_nowait(message)
            case Returned() if loan.returned:
                return
            case LoanExpired():
                loan.returned = True
                raise LeaseExpired(
                    f"the lease of {loan.session.key} ended before its blocks were returned; "
                    "what was read is discarded"
                )
            case BlocksRefused(_, error):
                loan.returned = True
                raise from_wire(error)
            case BatonError():
                raise message
            case _:
                raise TransportError(f"{loan.session.key} said {message!r} out of turn")


async def _read(loan: _Loan) -> None:
    """Read what arrives, all of it that is there at a time as one, and then return the loan."""
    done, ended = 0, False
    while not ended:
        messages = [await loan.arrived.get()]
        while not loan.arrived.empty():
            messages.append(loan.arrived.get_nowait())
        ended = isinstance(messages[-1], LendEnd)
        lends = [message for message in messages if isinstance(message, Lend)]
        if lends:
            done = await _read_batch(loan, lends, done)
    loan.returned = True
    loan.session.say(Return(loan.number))


async def _read_batch(loan: _Loan, lends: Sequence[Lend], done: int) -> int:
    remote = tuple(block for lend in lends for block in lend.blocks)
    digests = tuple(digest for lend in lends for digest in lend.digests)
    end = done + len(remote)

    def on_layers(layer_end: int) -> None:
        if loan.on_layers is not None:
            loan.on_layers(end, layer_end)

    lent = Lent(remote, tuple(loan.place[done:end]), digests)
    await loan.reads.read(lent, loan.layer_groups, on_layers)
    return end


async def _close(loan: _Loan) -> None:
    """Return when local memory is no longer written, and the lender knows that it may go on."""
    if not loan.reads.idle:
        await uninterrupted(loan.reads.settle())
    if loan.asked and not loan.returned:
        loan.returned = True
        loan.session.say(Return(loan.number))
