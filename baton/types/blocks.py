"""Messages on a blocks stream: cached KV blocks, found by key and lent for reading.

A worker dials a store, or another worker, to borrow; and its own node's store to offer what it has
computed. Whoever owns the memory is the lender, and lends under a lease; the borrower reads by the
transport, hands the loan back, and uses what it read only when the lender says that the lease still
held. Nobody writes into the other's memory.

    borrow (worker from store or worker)          offer (store from worker)
      Ask(n, keys)         ---->                    Offer(n, keys, blocks)  ---->
                           <----  Lend(n, ...)                              <----  Return(n)
      reads ...            <----  LendEnd(n)        (the store has read what it wanted)
      Renew([n])           ---->                                            <----  Renew([n])
      Return(n)            ---->                    Returned(n)             ---->
                           <----  Returned(n)       (the store keeps what it read)

`number` names a loan; the dialing side draws the numbers of both kinds from one counter. A lease is
renewed from the Ask or Offer on; Lend and Return may come while a source still looks for more. A
LendEnd of nothing ends its loan. When a lease runs out its lender says LoanExpired at once, and
what the borrower says of that loan from then on is ignored. When the stream ends, both sides forget
all loans: what was read under them is void.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.types.fleet import KvLayout
from baton.types.request import WireError


@dataclass(frozen=True, slots=True)
class BlocksHello:
    """First message of each side. `endpoint` is what the transport's `connect` takes."""

    name: str
    incarnation: str
    layout: KvLayout
    transport: str
    endpoint: bytes
    lease_ttl_s: float = 0.0  # of what this side lends
    expected_incarnation: str = ""  # said by the dialing side: the life it was routed to


@dataclass(frozen=True, slots=True)
class Ask:
    """Lend me the leading run of these chained keys (16 bytes each, concatenated)."""

    number: int
    keys: bytes


@dataclass(frozen=True, slots=True)
class Offer:
    """`blocks[i]` of the sender's pool has keys[i], whose chain is `depth + i` blocks long before
    it; all are leased until the store returns the loan. The store takes what it wants. `parent` is
    the key before the first one, empty when that is unknown or there is none.

    With `pin_s`, it is asked to keep all of them in its fastest tier that long, also those that it
    has already.
    """

    number: int
    keys: bytes
    blocks: tuple[int, ...]
    depth: int = 0
    digests: tuple[bytes, ...] = ()
    pin_s: float | None = None
    parent: bytes = b""


@dataclass(frozen=True, slots=True)
class Lend:
    """The asked keys [first, first + len(blocks)) may be read at `blocks` of the sender's pool. A
    loan comes in one or several of these, in order, without gaps."""

    number: int
    first: int
    blocks: tuple[int, ...]
    digests: tuple[bytes, ...] = ()  # empty, or one of each whole block


@dataclass(frozen=True, slots=True)
class LendEnd:
    """No more than `count` of the asked keys are lent."""

    number: int
    count: int


@dataclass(frozen=True, slots=True)
class RenewLoans:
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Return:
    """The borrower has read all that it wants, or gives up; it reads no more."""

    number: int


@dataclass(frozen=True, slots=True)
class Returned:
    """The lease held until the loan came back: what was read is good."""

    number: int


@dataclass(frozen=True, slots=True)
class LoanExpired:
    """The lease had ended before the loan came back: what was read is void."""

    number: int


@dataclass(frozen=True, slots=True)
class BlocksRefused:
    """The loan, or without a number the whole stream, is refused."""

    number: int | None
    error: WireError


BlocksMessage = (
    BlocksHello
    | Ask
    | Offer
    | Lend
    | LendEnd
    | RenewLoans
    | Return
    | Returned
    | LoanExpired
    | BlocksRefused
)
