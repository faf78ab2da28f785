"""The taking side of offers: a store reads what a worker has computed, if it wants it.

Offer -> sink.reserve -> read, verify -> Return -> Returned -> sink.commit each
                               anything else, once nothing is written -> sink.abort each
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.errors import BatonError, DeadlineExceeded, InvalidRequest, LeaseExpired, Overloaded
from baton.hashing import KEY_BYTES
from baton.kv.blocks.inboxes import Inbox, Inboxes
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.reads import Lent, Reads
from baton.kv.blocks.session import Session
from baton.kv.settle import uninterrupted
from baton.kv.transport.base import PoolMemory
from baton.rpc.errors import from_wire, to_wire
from baton.types.blocks import BlocksRefused, LoanExpired, Offer, Return, Returned
from baton.types.fleet import KvLayout
from baton.types.request import MAX_PIN_S

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a store wants to have the block of `keys[index]` of an offer."""

    key: bytes
    index: int
    block: int  # of the store's pool


class Sink(Protocol):
    """Who takes blocks: a store's fastest tier. Every slot that it has reserved is committed or
    aborted, exactly once, on the event loop; both must not raise."""

    async def reserve(
        self, keys: bytes, depth: int, parent: bytes, pin_s: float | None
    ) -> Sequence[Slot]:
        """Slots for those of `keys` that are wanted; nobody else writes into them. Gives back what
        it has reserved so far when it is cancelled or raises. `depth` blocks come before them, and
        `parent` is the key of the last of these, or empty. With `pin_s`, all of `keys` should
        stay that long: those that are there, and those that get slots."""

    def commit(self, slot: Slot) -> None:
        """The slot holds the block of its key."""

    def abort(self, slot: Slot) -> None:
        """The slot's contents are worth nothing, and nothing writes into it any more."""


class Taker:
    """Of one stream; what it takes are tasks of `tasks`, and end with it."""

    def __init__(
        self,
        session: Session,
        sink: Sink,
        memory: PoolMemory,
        layout: KvLayout,
        options: BlocksOptions,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.inboxes = Inboxes()
        self._session = session
        self._sink = sink
        self._memory = memory
        self._layout = layout
        self._options = options
        self._tasks = tasks

    def offer(self, offer: Offer) -> None:
        """Raises InvalidRequest for what no worker offers: the stream is of no use then."""
        count = len(offer.blocks)
        if not count or len(offer.keys) != count * KEY_BYTES:
            raise InvalidRequest(
                f"{self._session.key} offered {count} blocks by {len(offer.keys)} bytes of keys"
            )
        if offer.digests and len(offer.digests) != count:
            raise InvalidRequest(
                f"{self._session.key} offered {count} blocks with {len(offer.digests)} digests"
            )
        if len(offer.parent) not in (0, KEY_BYTES):
            raise InvalidRequest(
                f"{self._session.key} offered blocks behind a key of {len(offer.parent)} bytes"
            )
        if offer.pin_s is not None and not 0 < offer.pin_s <= MAX_PIN_S:
            raise InvalidRequest(f"{self._session.key} asked for a pin of {offer.pin_s} s")
        if len(self.inboxes) >= self._options.max_loans:
            full = Overloaded(f"{len(self.inboxes)} offers of {self._session.key} are open already")
            self._session.say(BlocksRefused(offer.number, to_wire(full)))
            return
        name = f"offer {offer.number} of {self._session.key}"
        self._tasks.create_task(self._take(offer), name=name)

    async def _take(self, offer: Offer) -> None:
        """Never raises because of the peer: it only offers."""
        try:
            with self.inboxes.open(offer.number) as inbox:
                async with asyncio.timeout(self._options.take_timeout_s):
                    slots = await self._sink.reserve(
                        offer.keys, offer.depth, offer.parent, offer.pin_s
                    )
                if slots:
                    await self._fill(offer, slots, inbox)
                    return
        except (BatonError, TimeoutError) as error:
            log.info("offer %d of %s was not taken: %s", offer.number, self._session.key, error)
        except Exception:
            log.exception("offer %d of %s could not be taken", offer.number, self._session.key)
        self._session.say(Return(offer.number))

    async def _fill(self, offer: Offer, slots: Sequence[Slot], inbox: Inbox) -> None:
        """Raises why the slots were aborted."""
        reads = Reads(self._session, self._memory, self._layout, self._options)
        good = False
        try:
            async with asyncio.timeout(self._options.take_timeout_s):
                await self._read(offer, slots, reads, inbox)
            good = True
        except TimeoutError:
            text = f"it took more than {self._options.take_timeout_s:g} s"
            raise DeadlineExceeded(text) from None
        finally:
            try:
                if not reads.idle:
                    await uninterrupted(reads.settle())
            finally:
                self._conclude(slots, good)

    def _conclude(self, slots: Sequence[Slot], good: bool) -> None:
        for slot in slots:
            try:
                if good:
                    self._sink.commit(slot)
                else:
                    self._sink.abort(slot)
            except Exception:  # the others must have their ending all the same
                log.exception("block %d of the store is lost", slot.block)

    async def _read(self, offer: Offer, slots: Sequence[Slot], reads: Reads, inbox: Inbox) -> None:
        """Read, return, and hear that the lease held. Raises when it did not."""
        remote = tuple(offer.blocks[slot.index] for slot in slots)
        digests = tuple(offer.digests[slot.index] for slot in slots) if offer.digests else ()
        local = tuple(slot.block for slot in slots)
        reading = asyncio.create_task(reads.read(Lent(remote, local, digests)))
        listening = asyncio.create_task(_confirmed(inbox))
        try:
            await asyncio.wait({reading, listening}, return_when=asyncio.FIRST_COMPLETED)
            if listening.done():  # before anything was returned: it ends the reading too
                await listening
                raise InvalidRequest(f"{self._session.key} ended an offer that was being read")
            await reading
            self._session.say(Return(offer.number))
            await listening
        finally:
            for task in (reading, listening):
                task.cancel()
            await asyncio.wait({reading, listening})


async def _confirmed(inbox: Inbox) -> None:
    """Return at `Returned`; raise what else ends the loan."""
    message = await inbox.get()
    match message:
        case Returned():
            return
        case LoanExpired(number):
            raise LeaseExpired(f"offer {number} was withdrawn while it was read")
        case BlocksRefused(_, error):
            raise from_wire(error)
        case BatonError():
            raise message
        case _:
            raise InvalidRequest(f"{message!r} was said of an offer")
