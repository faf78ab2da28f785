"""The serving side of blocks streams: what a store or a worker does for those who dial it."""

from __future__ import annotations

import asyncio
import logging

from baton.counts import Counts
from baton.errors import BatonError, InvalidRequest, PeerGone
from baton.kv.blocks.figures import LoanFigures
from baton.kv.blocks.lender import Lender, Source
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.session import BlocksStream, Session, answered
from baton.kv.blocks.taker import Sink, Taker
from baton.kv.identity import Identity
from baton.kv.transport.base import PoolMemory
from baton.kv.transport.shared import SharedTransport
from baton.rpc.errors import to_wire
from baton.types.blocks import (
    Ask,
    BlocksMessage,
    BlocksRefused,
    LoanExpired,
    Offer,
    RenewLoans,
    Return,
    Returned,
)

log = logging.getLogger(__name__)


class BlocksServer:
    """Implements BlocksService. Without a sink, offers are refused."""

    def __init__(
        self,
        identity: Identity,
        shared: SharedTransport,
        memory: PoolMemory,
        source: Source,
        sink: Sink | None,
        options: BlocksOptions,
        figures: LoanFigures | None = None,
    ) -> None:
        self._identity = identity
        self._shared = shared
        self._memory = memory
        self._source = source
        self._sink = sink
        self._options = options
        self._figures = figures or LoanFigures(Counts())
        self._streams: set[BlocksStream] = set()

    async def pair(self, stream: BlocksStream) -> None:
        """Serve one peer until its stream ends; then end all its loans, and all of its offers."""
        self._streams.add(stream)
        view = self._shared.view()
        try:
            async with answered(stream, self._identity, view, self._options) as session:
                await self._serve(session)
        except* PeerGone as gone:
            log.info("a blocks stream ended: %s", gone.exceptions[0])
        except* BatonError as group:
            log.warning("a blocks stream was refused: %s", group.exceptions[0])
        finally:
            self._streams.discard(stream)

    async def aclose(self) -> None:
        """End all streams. Their services end by themselves then."""
        await asyncio.gather(*(stream.aclose() for stream in tuple(self._streams)))

    async def _serve(self, session: Session) -> None:
        async with asyncio.TaskGroup() as tasks:
            service = _Service(session, self._lender(session, tasks), self._taker(session, tasks))
            tasks.create_task(service.renew(), name=f"renewals of offers of {session.key}")
            try:
                await service.listen()
            except BatonError as error:
                service.fail(error)
                if not isinstance(error, PeerGone):
                    await session.refuse(error)
                await session.break_off()  # else aborted reads would wait for the peer's help
                raise

    def _lender(self, session: Session, tasks: asyncio.TaskGroup) -> Lender:
        layout = self._identity.layout
        return Lender(
            session, self._source, self._memory, layout, self._options, tasks, self._figures
        )

    def _taker(self, session: Session, tasks: asyncio.TaskGroup) -> Taker | None:
        if self._sink is None:
            return None
        layout = self._identity.layout
        return Taker(session, self._sink, self._memory, layout, self._options, tasks)


class _Service:
    """One stream being served."""

    def __init__(self, session: Session, lender: Lender, taker: Taker | None) -> None:
        self._session = session
        self._lender = lender
        self._taker = taker

    async def listen(self) -> None:
        """Until the stream ends: PeerGone. Raises InvalidRequest for what makes no sense."""
        while True:
            await self._session.room()
            self._handle(await self._session.receive())
            await asyncio.sleep(0)  # a loan has begun before the next message, which may end it

    async def renew(self) -> None:
        if self._taker is not None:
            await self._taker.inboxes.renew(self._session)

    def fail(self, error: BatonError) -> None:
        if self._taker is not None:
            self._taker.inboxes.fail(error)

    def _handle(self, message: BlocksMessage) -> None:
        match message:
            case Ask():
                self._lender.ask(message)
            case RenewLoans(numbers):
                self._lender.loans.renew(numbers)
            case Return(number):
                self._lender.loans.give_back(number)
            case Offer(number) if self._taker is None:
                error = to_wire(InvalidRequest("this worker takes no blocks: offer to a store"))
                self._session.say(BlocksRefused(number, error))
            case Offer() if self._taker is not None:
                self._taker.offer(message)
            case Returned(number) | LoanExpired(number) | BlocksRefused(int(number)):
                if self._taker is not None:
                    self._taker.inboxes.deliver(number, message)
            case _:
                said = type(message).__name__
                raise InvalidRequest(f"{self._session.key} said {said} out of turn")
