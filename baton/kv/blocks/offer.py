"""The offering side: what a worker has computed is offered to its node's store, which reads it.

    offer (never waits) -> queue -> source.lend -> Offer -> (store reads) -> Return
                             |                                  -> source.end, Returned
                             '-> the oldest are dropped when the store does not keep up

Nothing is leased for what waits in the queue: blocks that are gone when their turn comes are left
out. Offers are a favour: none is repeated, and a store that is away is dialled again and again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from baton.errors import BatonError, InternalError, PeerGone
from baton.hashing import KEY_BYTES
from baton.kv.blocks.lender import Source
from baton.kv.blocks.loans import LoanId, Loans
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.session import Session, dialled
from baton.kv.digest import make_digests
from baton.kv.identity import Identity
from baton.kv.settle import raise_if_cancelled
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.shared import SharedTransport
from baton.rpc.errors import from_wire
from baton.rpc.services import BlocksDialer
from baton.types.blocks import BlocksRefused, Offer, RenewLoans, Return
from baton.types.figures import OfferCounts
from baton.types.fleet import Peer

log = logging.getLogger(__name__)


class Offers:
    """One per worker. `store.incarnation` may be empty: whichever store is at its address."""

    def __init__(
        self,
        store: Peer,
        identity: Identity,
        shared: SharedTransport,
        memory: PoolMemory,
        dialer: BlocksDialer,
        source: Source,
        options: BlocksOptions,
    ) -> None:
        self.counts = OfferCounts()
        self._store = store
        self._identity = identity
        self._shared = shared
        self._memory = memory
        self._dialer = dialer
        self._source = source
        self._options = options
        self._queue: deque[_Blocks] = deque()
        self._waiting = asyncio.Event()  # something is in the queue
        self._greeted = False

    def offer(
        self, keys: bytes, depth: int, parent: bytes = b"", pin_s: float | None = None
    ) -> None:
        """The blocks of chained `keys` (16 bytes each) are complete; `depth` blocks come before the
        first of them, the last of which has the key `parent` (empty: unknown, or there is none);
        the store is asked to pin them for `pin_s`. Never waits."""
        if not keys or len(keys) % KEY_BYTES or len(parent) not in (0, KEY_BYTES):
            raise InternalError(f"{len(keys)} bytes of keys behind {len(parent)} were offered")
        if len(self._queue) >= self._options.max_queued_offers:
            self._queue.popleft()
            self.counts = replace(self.counts, dropped=self.counts.dropped + 1)
        self._queue.append(_Blocks(keys, depth, parent, pin_s))
        self._waiting.set()

    async def run(self) -> None:
        """Keep the stream to the store, and send what is offered. Runs until cancelled."""
        delay = self._options.first_redial_s
        while True:
            self._greeted = False
            try:
                async with dialled(
                    self._store, self._identity, self._shared.view(), self._dialer, self._options
                ) as session:
                    self._greeted = True
                    await self._serve(session)
            except* BatonError as group:
                log.info("no stream to the store: %s", group.exceptions[0])
            except* Exception:
                log.exception("the stream to the store broke")
            raise_if_cancelled()
            delay = self._options.first_redial_s if self._greeted else 2 * delay
            delay = min(delay, self._options.last_redial_s)
            await asyncio.sleep(delay)

    async def _serve(self, session: Session) -> None:
        """Until the stream ends: PeerGone, in a group. Offers under way end with it."""
        loans = Loans(session, self._options.lease_ttl_s, self._options.linger_s)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send(session, loans, tasks), name="offers")
            await _listen(session, loans)

    async def _send(self, session: Session, loans: Loans, tasks: asyncio.TaskGroup) -> None:
        room = asyncio.Semaphore(self._options.max_offers)
        for number in itertools.count(1):
            await room.acquire()
            while not self._queue:
                self._waiting.clear()
                await self._waiting.wait()
            offer = _Offer(session, loans, number, self._queue.popleft())
            task = tasks.create_task(self._offer(offer), name=f"offer {number} to {session.key}")
            task.add_done_callback(lambda _: room.release())

    async def _offer(self, offer: _Offer) -> None:
        loan = LoanId(offer.session.key, offer.number)
        outcome: bool | None = False
        try:
            outcome = await offer.loans.keep(offer.number, partial(self._say, loan, offer))
        except BatonError as error:
            log.info("offer %d to %s failed: %s", offer.number, offer.session.key, error)
        except Exception:
            log.exception("offer %d to %s failed", offer.number, offer.session.key)
        finally:
            self._source.end(loan)
            self._count(outcome)

    async def _say(self, loan: LoanId, offer: _Offer) -> bool:
        """Lease what is still there, and offer it. False when there is nothing."""
        blocks: list[int] = []
        offered = offer.blocks
        async with aclosing(self._source.lend(loan, offered.keys)) as runs:
            async for run in runs:
                blocks += run
        if not blocks:
            return False
        digests = await make_digests(
            self._memory,
            self._identity.layout,
            blocks,
            self._options.verify,
            self._options.inline_digest_bytes,
        )
        keys = offered.keys[: len(blocks) * KEY_BYTES]
        offer.session.say(
            Offer(
                offer.number,
                keys,
                tuple(blocks),
                offered.depth,
                digests,
                offered.pin_s,
                offered.parent,
            )
        )
        return True

    def _count(self, outcome: bool | None) -> None:
        counts = self.counts
        match outcome:
            case True:
                self.counts = replace(counts, read=counts.read + 1)
            case False:
                self.counts = replace(counts, failed=counts.failed + 1)
            case None:
                self.counts = replace(counts, gone=counts.gone + 1)


@dataclass(frozen=True, slots=True)
class _Blocks:
    keys: bytes
    depth: int
    parent: bytes
    pin_s: float | None


@dataclass(frozen=True, slots=True, eq=False)
class _Offer:
    session: Session
    loans: Loans
    number: int
    blocks: _Blocks


async def _listen(session: Session, loans: Loans) -> None:
    while True:
        match await session.receive():
            case RenewLoans(numbers):
                loans.renew(numbers)
            case Return(number):
                loans.give_back(number)
            case BlocksRefused(number, why):
                if number is None:
                    raise from_wire(why)
                loans.decline(number)
            case message:
                raise PeerGone(f"{session.key} said {type(message).__name__} out of turn")
