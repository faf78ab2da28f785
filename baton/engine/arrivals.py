"""Sequences that wait for KV from elsewhere, which a transfer brings into their own blocks.

    waiting --start--> arriving --loaded--> running       the first blocks are hits of this pool,
                           |                              the next ones arrive, the rest is computed
                           +--removed--> stranded --ended--> free

A transfer may write until it has ended. So the blocks of a sequence that goes earlier are stranded:
in quarantine until then.

When the first layers of all its blocks have come, an arriving sequence may be in a step already,
behind a gate (`gate.py`). It stays here, and nobody else finds its blocks, until all has come; then
that step is like any other. If less comes, the sequence goes on from there when the step has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.engine.block_pool import BlockPool
from baton.engine.gate import Gate
from baton.engine.sequence import Sequence
from baton.errors import InternalError


@dataclass(slots=True, eq=False)
class _Arrival:
    sequence: Sequence
    first: int  # logical blocks [first, last) arrive
    last: int
    gate: Gate = field(default_factory=Gate)
    came: int | None = None  # blocks; the transfer has ended, but not a step that will not count


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

    def layers_came(self, number: int, layer_end: int) -> bool:
        """Layers [0, layer_end) of all blocks that were to arrive for a sequence are there, and
        may still turn out to be wrong. Whether it may begin now, and could not before."""
        arrival = self._arrivals.get(number)
        if arrival is None:
            return False
        before = arrival.gate.ready
        arrival.gate.open(layer_end)
        return arrival.gate.ready and not before

    def next_early(self) -> tuple[Sequence, int, Gate] | None:
        """A sequence that may begin before everything has come, in no step yet; the first block
        that it would compute, and the gate that its step has to pass."""
        for arrival in self._arrivals.values():
            sequence = arrival.sequence
            if arrival.gate.ready and not sequence.steps:
                return sequence, arrival.last, arrival.gate
        return None

    def hurry(self, sequence: Sequence) -> None:
        """The sequence is to go: its step, if it is in one, need not wait for anything."""
        arrival = self._arrivals.get(sequence.number)
        if arrival is not None:
            arrival.gate.close()

    def end(self, number: int, blocks: int, now: float) -> tuple[Sequence, int] | None:
        """The transfer for a sequence writes no more and brought its first so many blocks. The
        sequence, which waits for nothing now, and its leading blocks that have KV; None when it has
        gone, or is in a step that will not count: then `step_ended` says it."""
        arrival = self._arrivals.get(number)
        if arrival is None:
            self._pool.end_quarantine(self._stranded.pop(number, ()))
            return None
        if not 0 <= blocks <= arrival.last - arrival.first:
            raise InternalError(
                f"{blocks} blocks arrived where {arrival.last - arrival.first} were wanted."
            )
        arrival.sequence.arrived_at = now
        counts = arrival.gate.settle(blocks == arrival.last - arrival.first)
        if arrival.sequence.steps and not counts:
            arrival.came = blocks
            return None
        del self._arrivals[number]
        return arrival.sequence, arrival.first + blocks

    def step_ended(self, sequence: Sequence) -> int | None:
        """The step in which the sequence was is over and does not count. Its leading blocks that
        have KV, if it waits for nothing now."""
        arrival = self._arrivals[sequence.number]
        if arrival.came is None:
            return None
        del self._arrivals[sequence.number]
        return arrival.first + arrival.came

    def strand(self, sequence: Sequence) -> None:
        """The sequence, which is in no step, goes; its blocks are free, those that arrive once the
        transfer has ended."""
        arrival = self._arrivals.pop(sequence.number)
        blocks = sequence.blocks
        if arrival.came is not None:
            self._pool.release(blocks)
            sequence.blocks = ()
            return
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
