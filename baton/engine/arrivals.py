"""Sequences that wait for KV from elsewhere, which a transfer brings into their own blocks.

    waiting --start--> arriving --loaded--> running       the first blocks are hits of this pool,
                           |                              the next ones arrive, the rest is computed
                           +--removed--> stranded --ended--> free

A transfer may write until it has ended. So the blocks of a sequence that goes earlier are stranded:
in quarantine until then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from baton.engine.block_pool import BlockPool
from baton.engine.sequence import Sequence
from baton.errors import InternalError


@dataclass(frozen=True, slots=True)
class _Arrival:
    sequence: Sequence
    first: int  # logical blocks [first, last) arrive
    last: int


class Arrivals:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._arrivals: dict[int, _Arrival] = {}
        self._stranded: dict[int, tuple[int, ...]] = {}
        self._news: list[_Arrival] = []

    def __len__(self) -> int:
        return len(self._arrivals)

    def __iter__(self) -> Iterator[Sequence]:
        return (arrival.sequence for arrival in self._arrivals.values())

    def __contains__(self, sequence: Sequence) -> bool:
        arrival = self._arrivals.get(sequence.number)
        return arrival is not None and arrival.sequence is sequence

    @property
    def num_growing(self) -> int:
        """Those that will need blocks for an answer."""
        return sum(not sequence.hand_off for sequence in self)

    def begin(self, sequence: Sequence, first: int, last: int) -> None:
        """Its logical blocks [first, last), which it holds, are to arrive."""
        arrival = _Arrival(sequence, first, last)
        self._arrivals[sequence.number] = arrival
        self._news.append(arrival)

    def take_news(self) -> list[tuple[Sequence, int, int]]:
        """What began since the last call and is still wanted: sequence, first and last block."""
        news, self._news = self._news, []
        return [
            (arrival.sequence, arrival.first, arrival.last)
            for arrival in news
            if arrival.sequence in self
        ]

    def end(self, number: int, blocks: int) -> tuple[Sequence, int] | None:
        """The transfer for a sequence writes no more and brought its first so many blocks. The
        sequence, which waits for nothing now, and its leading blocks that have KV; None when it has
        gone."""
        arrival = self._arrivals.get(number)
        if arrival is None:
            self._pool.end_quarantine(self._stranded.pop(number, ()))
            return None
        if not 0 <= blocks <= arrival.last - arrival.first:
            raise InternalError(
                f"{blocks} blocks arrived where {arrival.last - arrival.first} were wanted."
            )
        del self._arrivals[number]
        return arrival.sequence, arrival.first + blocks

    def strand(self, sequence: Sequence) -> None:
        """The sequence goes; its blocks are free, those that arrive once the transfer has ended."""
        arrival = self._arrivals.pop(sequence.number)
        blocks = sequence.blocks
        arriving = blocks[arrival.first : arrival.last]
        self._pool.release(blocks[arrival.last :])
        self._pool.quarantine(arriving)
        self._pool.release(blocks[: arrival.first])
        sequence.blocks = ()
        if arrival in self._news:  # nobody was told: nobody writes
            self._news.remove(arrival)
            self._pool.end_quarantine(arriving)
        else:
            self._stranded[sequence.number] = arriving
