"""The dialing side's end of one stream, shared by all that is borrowed from one peer."""

from __future__ import annotations

import asyncio
import itertools
import logging

from baton.errors import BatonError, InternalError, PeerGone
from baton.kv.blocks.inboxes import Inboxes
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.session import Session, dialled
from baton.kv.identity import Identity
from baton.kv.transport.shared import SharedTransport
from baton.rpc.errors import copy_of, from_wire
from baton.rpc.services import BlocksDialer
from baton.types.blocks import (
    Ask,
    BlocksHello,
    BlocksRefused,
    Lend,
    LendEnd,
    LoanExpired,
    Offer,
    RenewLoans,
    Return,
    Returned,
)
from baton.types.fleet import Peer

log = logging.getLogger(__name__)


class Pair:
    """`run` dials, greets and delivers messages until the stream ends; its owner awaits it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.inboxes = Inboxes()
        self.numbers = itertools.count(1)
        self.greeted = False
        self._session: Session | None = None
        self._ready = asyncio.Event()
        self._failure: BatonError | None = None

    async def session(self) -> Session:
        """When both sides have greeted. Raises what prevented it, or why the stream has ended."""
        await self._ready.wait()
        if self._failure is not None:
            raise copy_of(self._failure)
        if self._session is None:
            raise InternalError("a stream is ready without a session")
        return self._session

    async def run(
        self,
        identity: Identity,
        shared: SharedTransport,
        dialer: BlocksDialer,
        options: BlocksOptions,
    ) -> BatonError:
        """Why the stream ended, or never stood. Loans learn of it through their inboxes, before
        their reads are ended."""
        failure: BatonError = PeerGone(f"the stream to {self.peer.name} was closed here")
        try:
            async with dialled(self.peer, identity, shared.view(), dialer, options) as session:
                self._session, self.greeted = session, True
                self._ready.set()
                renewals = asyncio.create_task(self.inboxes.renew(session), name="loan renewals")
                try:
                    failure = await self._deliver(session)
                finally:
                    self._end(failure)
                    renewals.cancel()
                    await asyncio.wait([renewals])
        except BatonError as error:
            failure = error
        except Exception as error:
            log.exception("the stream to %s broke", self.peer.name)
            failure = InternalError(f"the stream to {self.peer.name} broke: {error}")
        finally:
            self._end(failure)
        return failure

    def _end(self, failure: BatonError) -> None:
        if self._failure is None:
            self._failure = failure
            self._ready.set()
            self.inboxes.fail(failure)

    async def _deliver(self, session: Session) -> BatonError:
        while True:
            try:
                message = await session.receive()
            except PeerGone as error:
                return error
            match message:
                case Lend() | LendEnd() | Returned() | LoanExpired():
                    self.inboxes.deliver(message.number, message)
                case BlocksRefused(number, why):
                    if number is None:
                        return from_wire(why)
                    self.inboxes.deliver(number, message)
                case BlocksHello() | Ask() | Offer() | RenewLoans() | Return():
                    return PeerGone(f"{session.key} said {type(message).__name__} out of turn")
