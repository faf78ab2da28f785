"""What one side of a stream has lent to the other: leases, their ends, and who hears of them.

            keep                      give_back in time -> Returned
    (none) ------> held, renewable ---- lease runs out ---> LoanExpired
                       |                stream breaks ----> (nobody is left to hear it)
                       '--------------- nothing to lend --> (LendEnd has said so)

A loan is a task: what it holds is held as long as the task lives, whatever ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

from baton.kv.blocks.session import Session
from baton.types.blocks import LoanExpired, Returned


@dataclass(frozen=True, slots=True, eq=False)
class LoanId:
    """One loan, as its source knows it. Equal to itself only: streams count from one each."""

    borrower: str
    number: int


@dataclass(slots=True, eq=False)
class _Loan:
    lease: asyncio.Timeout
    returned: bool = False
    declined: bool = False

    @property
    def ending(self) -> bool:
        return self.returned or self.declined or self.lease.expired()


@dataclass(slots=True)
class Loans:
    """Of one stream, in one direction."""

    session: Session
    ttl_s: float
    linger_s: float
    _open: dict[int, _Loan] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, number: int) -> bool:
        return number in self._open

    def renew(self, numbers: Iterable[int]) -> None:
        """Give these leases a whole ttl; what has ended stays so."""
        until = asyncio.get_running_loop().time() + self.ttl_s
        for number in numbers:
            loan = self._open.get(number)
            if loan is not None and not loan.ending:
                loan.lease.reschedule(until)

    def give_back(self, number: int) -> None:
        """The borrower reads no more. Ignored when the loan has ended: the stream says so already.

        What counts is that the blocks were still held, not the time: an overdue lease that is held
        was good.
        """
        loan = self._open.get(number)
        if loan is not None and not loan.ending:
            loan.returned = True
            loan.lease.reschedule(asyncio.get_running_loop().time())  # its task goes on now

    def decline(self, number: int) -> None:
        """The borrower does not want it, and has read nothing."""
        loan = self._open.get(number)
        if loan is not None and not loan.ending:
            loan.declined = True
            loan.lease.reschedule(asyncio.get_running_loop().time())

    async def keep(self, number: int, hand_over: Callable[[], Awaitable[bool]]) -> bool | None:
        """Say with `hand_over` what is lent, then hold it until it comes back or the lease ends.

        True when it came back in time, False when the lease ended first or nobody wants it, and
        None when `hand_over` returned False: there was nothing to lend. Raises what `hand_over`
        raised. The borrower is told how it ended, unless he has said so himself or got nothing.
        What is lent must stay as it is until this returns.
        """
        loan = _Loan(asyncio.timeout(self.ttl_s))
        self._open[number] = loan
        serving = ExitStack()
        serving.enter_context(self.session.transport.serving(self.session.key))
        idle = False  # the borrower has said that its reads have ended
        try:
            async with loan.lease:
                if not await hand_over():
                    idle = True
                    return None
                await asyncio.get_running_loop().create_future()
        except TimeoutError:
            if not loan.lease.expired():
                raise  # of `hand_over`
            idle = loan.returned or loan.declined
        finally:
            del self._open[number]
            if idle:
                serving.close()
            else:  # its transfers may still run, and over TCP end only with our progress
                asyncio.get_running_loop().call_later(self.linger_s, serving.close)
        if not loan.declined:
            self.session.say(Returned(number) if loan.returned else LoanExpired(number))
        return loan.returned
