"""The borrowing side's loans of one stream: who hears what the lender says of each."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from baton.errors import BatonError, InvalidRequest
from baton.kv.blocks.session import Session
from baton.rpc.errors import copy_of
from baton.types.blocks import BlocksMessage, RenewLoans

Inbox = asyncio.Queue[BlocksMessage | BatonError]
"""Messages about one loan, or the error that ended the stream."""

RENEWALS_PER_TTL = 3


class Inboxes:
    def __init__(self) -> None:
        self._open: dict[int, Inbox] = {}
        self._failure: BatonError | None = None

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def open(self, number: int) -> Iterator[Inbox]:
        """From here on the loan is renewed and its messages are kept. Raises why the stream has
        ended, and InvalidRequest for a number that is in use."""
        if self._failure is not None:
            raise copy_of(self._failure)
        if number in self._open:
            raise InvalidRequest(f"loan {number} is open already")
        inbox = self._open[number] = Inbox()
        try:
            yield inbox
        finally:
            del self._open[number]

    def deliver(self, number: int, message: BlocksMessage) -> None:
        """Messages about loans that were closed meanwhile are dropped."""
        inbox = self._open.get(number)
        if inbox is not None:
            inbox.put_nowait(message)

    def fail(self, error: BatonError) -> None:
        """The stream has ended: everybody hears why, also whoever comes later."""
        self._failure = error
        for inbox in self._open.values():
            inbox.put_nowait(copy_of(error))

    async def renew(self, session: Session) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(session.ttl_s / RENEWALS_PER_TTL)
            if self._open:
                session.say(RenewLoans(tuple(self._open)))
