"""With which limits cached blocks are lent and borrowed."""

from __future__ import annotations

from dataclasses import dataclass

from baton.kv.digest import Verify


@dataclass(frozen=True, slots=True)
class BlocksOptions:
    lease_ttl_s: float = 10.0  # a loan that nobody renews ends after this
    hello_timeout_s: float = 10.0  # for dialling and greeting together
    take_timeout_s: float = 30.0  # what an offer may take to be read and confirmed
    linger_s: float = 30.0  # a lender still helps on reads that were given up; then they are cut
    first_redial_s: float = 0.1
    last_redial_s: float = 5.0
    verify: Verify = Verify.SAMPLE  # said by the lender, followed by the borrower
    inline_digest_bytes: int = 2 << 20  # up to so many are hashed on the event loop (< 0.5 ms)
    max_loans: int = 256  # open at a time, per stream and direction; more are refused
    max_offers: int = 8  # under way at a time
    max_queued_offers: int = 256  # beyond that, the oldest are dropped
