"""What those who lend blocks count, for `/metrics`."""

from __future__ import annotations

from enum import StrEnum

from baton.counts import Counts


class LoanEnd(StrEnum):
    RETURNED = "returned"  # in time: what was read counts
    EXPIRED = "expired"  # the borrower did not renew the lease
    EMPTY = "empty"  # nothing of what was asked for was there
    FAILED = "failed"  # or the stream broke

    @staticmethod
    def of(returned: bool | None) -> LoanEnd:
        """What `Loans.keep` returned."""
        if returned is None:
            return LoanEnd.EMPTY
        return LoanEnd.RETURNED if returned else LoanEnd.EXPIRED


class LoanFigures:
    def __init__(self, metrics: Counts) -> None:
        self.ended = metrics.tallies(
            "baton_loans_ended",
            "Loans of KV blocks to other processes, by how they ended.",
            "how",
            LoanEnd,
        )
