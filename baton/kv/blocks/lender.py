"""The lending side of borrowing: answers what is asked on one stream from a source of blocks.

Ask -> source.lend -> Lend* LendEnd -> (borrower reads) -> Return -> source.end, Returned
                                          lease runs out, stream breaks -> source.end
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Protocol

from baton.errors import BatonError, InternalError, InvalidRequest, Overloaded
from baton.hashing import KEY_BYTES
from baton.kv.blocks.figures import LoanEnd, LoanFigures
from baton.kv.blocks.loans import LoanId, Loans
from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.session import Session
from baton.kv.digest import make_digests
from baton.kv.transport.base import PoolMemory
from baton.rpc.errors import to_wire
from baton.types.blocks import Ask, BlocksRefused, Lend, LendEnd
from baton.types.fleet import KvLayout

log = logging.getLogger(__name__)


class Source(Protocol):
    """Who has blocks to lend: a worker's pool, or a store's tiers.

    How many may be lent at a time is up to it: it may yield less than it has.
    """

    def lend(self, loan: LoanId, keys: bytes) -> AsyncGenerator[tuple[int, ...], None]:
        """Yield the blocks of the leading run of `keys` that is there: what can be read at once
        first, then what had to be brought from a slower tier. From when it is yielded until
        `end(loan)` each block keeps its contents.

        May be cancelled at any time, and holds nothing then but what it has yielded. Is closed
        (its `finally` has run) before `end` is called.
        """

    def end(self, loan: LoanId) -> None:
        """Nobody reads under this loan any more, or may believe what he reads. Called exactly once
        for each `lend`, also if that yielded nothing, on the event loop. Must not raise."""


class Lender:
    """Of one stream; its loans are tasks of `tasks`, and end with it."""

    def __init__(
        self,
        session: Session,
        source: Source,
        memory: PoolMemory,
        layout: KvLayout,
        options: BlocksOptions,
        tasks: asyncio.TaskGroup,
        figures: LoanFigures,
    ) -> None:
        self.loans = Loans(session, options.lease_ttl_s, options.linger_s)
        self._session = session
        self._source = source
        self._memory = memory
        self._layout = layout
        self._options = options
        self._tasks = tasks
        self._figures = figures

    def ask(self, ask: Ask) -> None:
        """Raises InvalidRequest for what no borrower asks: the stream is of no use then."""
        number = ask.number
        if number in self.loans or not ask.keys or len(ask.keys) % KEY_BYTES:
            raise InvalidRequest(
                f"{self._session.key} asked for {len(ask.keys)} bytes of keys as loan {number}"
            )
        if len(self.loans) >= self._options.max_loans:
            full = Overloaded(f"{len(self.loans)} loans to {self._session.key} are open already")
            self._session.say(BlocksRefused(number, to_wire(full)))
            return
        self._tasks.create_task(self._lend(ask), name=f"loan {number} to {self._session.key}")

    async def _lend(self, ask: Ask) -> None:
        loan = LoanId(self._session.key, ask.number)
        how = LoanEnd.FAILED
        try:
            kept = await self.loans.keep(ask.number, partial(self._hand_over, loan, ask))
            how = LoanEnd.of(kept)
        except BatonError as error:
            self._session.say(BlocksRefused(ask.number, to_wire(error)))
        except Exception as error:
            log.exception("loan %d to %s failed", ask.number, self._session.key)
            self._session.say(BlocksRefused(ask.number, to_wire(error)))
        finally:
            self._source.end(loan)
            self._figures.ended.add(how)

    async def _hand_over(self, loan: LoanId, ask: Ask) -> bool:
        asked, count = len(ask.keys) // KEY_BYTES, 0
        async with aclosing(self._source.lend(loan, ask.keys)) as runs:
            async for blocks in runs:
                if count + len(blocks) > asked:
                    raise InternalError(f"{count + len(blocks)} blocks were lent for {asked} keys")
                if blocks:
                    digests = await self._digests(blocks)
                    self._session.say(Lend(ask.number, count, blocks, digests))
                    count += len(blocks)
        self._session.say(LendEnd(ask.number, count))
        return count > 0

    async def _digests(self, blocks: tuple[int, ...]) -> tuple[bytes, ...]:
        options = self._options
        return await make_digests(
            self._memory, self._layout, blocks, options.verify, options.inline_digest_bytes
        )
