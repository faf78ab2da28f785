"""Who waits for blocks: sequences and reservations, in one line.

It is ordered by priority, and within that by when they are due: when they came, and the slack of
the task later (earliest deadline first). Nobody waits for those that come after it is due.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from baton.engine.sequence import Sequence
from baton.types.request import AttemptId

Order = tuple[int, float, int]
"""(priority, due in loop time, number)"""


class Reserved(NamedTuple):
    """Blocks for a whole context, of which the first `cached` hold its KV already: those are shared
    with others, and must not be written."""

    blocks: tuple[int, ...]
    cached: int


@dataclass(slots=True, eq=False)
class Reservation:
    """Blocks for KV that will arrive from another worker. `blocks` is empty while it waits."""

    number: int
    attempt: AttemptId
    num_blocks: int
    order: Order
    settle: Callable[[Reserved | None], None]  # once: the blocks, or None when cancelled
    context: Sequence | None = None  # what the KV is of, if that is known: some of it may be here
    blocks: tuple[int, ...] = ()
    cached: int = 0
    quarantined: bool = False  # its blocks are out of use until the reservation is dropped
    transfer_pending: bool = False  # only the transport's word ends the quarantine


class Ordered(Protocol):
    @property
    def order(self) -> Order:
        """Unique, lower first, constant while in a line."""


T = TypeVar("T", bound=Ordered)


class Line(Generic[T]):
    """A list sorted by `order`. Insertion and removal move pointers only: fast up to thousands."""

    def __init__(self) -> None:
        self._entries: list[T] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def __reversed__(self) -> Iterator[T]:
        return reversed(self._entries)

    @property
    def first(self) -> T | None:
        return self._entries[0] if self._entries else None

    def add(self, entry: T) -> None:
        insort(self._entries, entry, key=_order)

    def remove(self, entry: T) -> None:
        """Raises ValueError when the entry is not in the line."""
        at = bisect_left(self._entries, entry.order, key=_order)
        if at == len(self._entries) or self._entries[at] is not entry:
            raise ValueError(f"{entry!r} is not in the line")
        del self._entries[at]


class WaitingLine(Line[Sequence | Reservation]):
    """Also keeps count of the tokens that will have to be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    def add(self, entry: Sequence | Reservation) -> None:
        super().add(entry)
        self.tokens += _tokens(entry)

    def remove(self, entry: Sequence | Reservation) -> None:
        super().remove(entry)
        self.tokens -= _tokens(entry)


def _order(entry: Ordered) -> Order:
    return entry.order


def _tokens(entry: Sequence | Reservation) -> int:
    return entry.remaining if isinstance(entry, Sequence) else 0
