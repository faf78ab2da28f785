"""Who is in an engine, and which blocks of the pool each one holds."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection

from baton.engine.arrivals import Arrivals
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.events import KvFilled, KvWanted
from baton.engine.loans import Loans
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Ending, Sequence
from baton.engine.waiting import Line, Reservation, Reserved, WaitingLine
from baton.errors import InternalError, Overloaded
from baton.types.fleet import WorkerLoad
from baton.types.request import AttemptId

log = logging.getLogger(__name__)


class Residents:
    """Synchronous and torch-free; belongs to the event loop. Every block in the pool is held by a
    running or leaving sequence, a granted reservation or a handed-off sequence, or by nobody."""

    def __init__(self, pool: BlockPool, config: EngineConfig, loans: Loans | None = None) -> None:
        self._pool = pool
        self._config = config
        self._cache = PrefixCache(pool, config.layout, config.prefix_caching)
        self._waiting = WaitingLine()
        self._running: Line[Sequence] = Line()
        self._leaving: dict[int, Sequence] = {}  # by number: ended, but a step in flight uses them
        self._settled = False  # since the last `take_settled`
        self._granted: set[Reservation] = set()  # quarantined ones included
        self._handed_off: dict[AttemptId, Sequence] = {}
        self._arrivals = Arrivals(pool)  # they hold blocks, but have no part in steps yet
        self._loans = loans or Loans(pool)
        # Every context ends at this length: the model's, or what the whole pool can hold.
        self._longest = min(config.max_model_len, config.num_blocks * config.block_size + 1)

    # -- entering and leaving ---------------------------------------------------------------

    def enqueue(self, entry: Sequence | Reservation) -> None:
        """Raises Overloaded when the line is full."""
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests wait on this worker, which is its bound: retry "
                "later."
            )
        if isinstance(entry, Sequence):
            entry.limit = min(entry.limit, self._longest)
        self._waiting.add(entry)
        self.grant_reservations()

    def admit(self, sequence: Sequence, reservation: Reservation, cached_tokens: int) -> None:
        """Run a sequence whose KV, all but the last token's, is in the reservation's blocks."""
        self._granted.remove(reservation)
        sequence.blocks, reservation.blocks = reservation.blocks, ()
        sequence.limit = min(sequence.limit, self._longest)
        sequence.computed = sequence.planned = len(sequence.context) - 1
        sequence.cached_tokens = cached_tokens
        self._cache.register(sequence, 0)
        self._running.add(sequence)

    def remove(self, sequence: Sequence, ending: Ending) -> bool:
        """Take a sequence out and free its blocks, wherever it is. False while a step is using
        it: then it leaves with that step's commit."""
        if sequence.steps:
            sequence.ending = sequence.ending or ending
            self._arrivals.hurry(sequence)
            return False
        if self._handed_off.pop(sequence.task.attempt, None) is not None:
            self._pool.end_lease(sequence.blocks)
        elif sequence.blocks:
            self._leave(sequence)
        else:
            self._waiting.remove(sequence)
        return True

    def layers_came(self, number: int, layer_end: int) -> bool:
        """The transfer for a sequence has brought layers [0, layer_end) of all its blocks. Whether
        that lets it begin."""
        return self._arrivals.layers_came(number, layer_end)

    def arrived(self, number: int, blocks: int, now: float) -> Sequence | None:
        """The transfer for a sequence has ended and brought the KV of so many of its blocks. The
        sequence, if it runs now."""
        arrival = self._arrivals.end(number, blocks, now)
        if arrival is None:
            return None
        sequence, filled = arrival
        self._run_arrived(sequence, filled)
        return sequence

    def _run_arrived(self, sequence: Sequence, filled: int) -> None:
        """With KV in its first `filled` blocks. A step that it is in begins behind them."""
        before = sequence.computed
        sequence.computed = filled * self._config.block_size
        if not sequence.steps:
            sequence.planned = sequence.computed
        sequence.cached_tokens = min(sequence.computed, len(sequence.task.prompt))
        self._cache.register(sequence, before)
        self._running.add(sequence)

    def take_wanted(self) -> tuple[KvWanted, ...]:
        """What sequences that have entered since the last call want from elsewhere."""
        return tuple(
            KvWanted(
                sequence.number,
                sequence.task.attempt,
                first,
                sequence.blocks[first:last],
                b"".join(sequence.keys[first:last]),
            )
            for sequence, first, last in self._arrivals.take_news()
        )

    def take_filled(self) -> tuple[KvFilled, ...]:
        """Blocks that have become full and findable since the last call."""
        return self._cache.take_filled()

    def take_settled(self) -> bool:
        """Whether, since the last call, a step gave back blocks of sequences that had ended."""
        settled, self._settled = self._settled, False
        return settled

    def drop_reservation(self, reservation: Reservation) -> None:
        """Free its blocks: nothing writes to them. It need not have been granted."""
        if reservation not in self._granted:
            self._waiting.remove(reservation)
            return
        self._granted.remove(reservation)
        if reservation.quarantined:
            self._pool.end_quarantine(reservation.blocks[reservation.cached :])
        else:
            self._pool.release(reservation.blocks)
        reservation.blocks = ()

    def quarantine(self, reservation: Reservation) -> None:
        """Keep the blocks of a granted reservation out of use until it is dropped."""
        if not reservation.quarantined:
            reservation.quarantined = True
            self._pool.quarantine(reservation.blocks[reservation.cached :])
            self._pool.release(reservation.blocks[: reservation.cached])

    def grant_reservations(self) -> None:
        """Grant reservations at the head of the line as far as blocks and places go."""
        while (
            isinstance(head := self._waiting.first, Reservation)
            and self._has_place()
            and (reserved := self._allocate_for(head)) is not None
        ):
            self._waiting.remove(head)
            self._granted.add(head)
            head.blocks, head.cached = reserved
            head.settle(reserved)

    # -- inspection -------------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        prefilling = sum(s.remaining for s in self._running if s.remaining > 1)
        prefilling += sum(sequence.remaining for sequence in self._arrivals)
        entered = len(self._running) + len(self._arrivals)
        return WorkerLoad(
            running=entered + len(self._granted) + len(self._handed_off),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.tokens + prefilling,
            blocks=self._pool.counts(),
        )

    def is_handed_off(self, attempt: AttemptId) -> bool:
        return attempt in self._handed_off

    def attempts(self) -> Counter[AttemptId]:
        """Every live attempt that is here, once per place (so never more than once)."""
        sequences = (*self._running, *self._arrivals, *self._handed_off.values())
        entries = (*self._granted, *self._waiting)
        return Counter(
            [s.task.attempt for s in sequences]
            + [e.task.attempt if isinstance(e, Sequence) else e.attempt for e in entries]
        )

    def check_integrity(self) -> None:
        """Raises InternalError unless every hold on a block has its holder here."""
        references: Counter[int] = Counter()
        leases: Counter[int] = Counter()
        for sequence in self._running:
            references.update(sequence.blocks)
            leases.update(sequence.blocks[: sequence.leased])
            if len(sequence.blocks) * self._config.block_size < sequence.planned:
                raise InternalError(f"{sequence.task.attempt} has more KV than blocks.")
            if sequence.remaining < 1 or sequence.unplanned < 1:
                raise InternalError(f"{sequence.task.attempt} has nothing to compute.")
            if sequence.computed != sequence.planned and not sequence.steps:
                raise InternalError(f"{sequence.task.attempt} counts on KV that nobody computes.")
        for sequence in self._leaving.values():
            references.update(sequence.blocks)
            if not sequence.steps:
                raise InternalError(f"{sequence.task.attempt} left, and still holds blocks.")
        for reservation in self._granted:
            if not reservation.quarantined:
                references.update(reservation.blocks)
        for sequence in self._arrivals:
            references.update(sequence.blocks)
        for sequence in self._handed_off.values():
            leases.update(sequence.blocks)
        leases.update(self._loans.leases)
        self._pool.check_integrity(references, leases)
        waiting = sum(e.remaining for e in self._waiting if isinstance(e, Sequence))
        if waiting != self._waiting.tokens:
            raise InternalError(f"{waiting} tokens wait, {self._waiting.tokens} are counted.")

    # -- places and blocks ------------------------------------------------------------------

    def _has_place(self, spent: int = 0) -> bool:
        """`spent` running sequences will need their places no more."""
        entered = len(self._running) + len(self._arrivals) - spent
        return entered + self._reserved() < self._config.max_num_seqs

    def _reserved(self) -> int:
        """Reservations that will become running sequences."""
        return sum(not reservation.quarantined for reservation in self._granted)

    def _headroom(self) -> int:
        """Blocks that a newcomer leaves to the others: one for each that will grow, so that nobody
        is preempted as soon as it came."""
        growing = sum(not sequence.hand_off for sequence in self._running)
        return self._reserved() + growing + self._arrivals.num_growing

    def _allocate_for(self, reservation: Reservation) -> Reserved | None:
        hits: tuple[int, ...] = ()
        if reservation.context is not None:
            known, computed, _ = self._cache.match(reservation.context)
            hits = known[:computed]
        self._pool.share(hits)
        fresh = reservation.num_blocks - len(hits)
        if self._pool.available < fresh + self._headroom():
            self._pool.release(hits)
            return None
        blocks = self._pool.allocate(fresh)
        if blocks is None:
            raise InternalError("The pool refused blocks that it had said were available.")
        return Reserved(hits + blocks, len(hits))

    def _start(self, sequence: Sequence, now: float, cuts: Collection[bytes]) -> bool:
        """Give a waiting sequence blocks for its whole context, or leave it waiting: when they are
        not there, or when the first one that it would compute is one of `cuts`, which others are
        about to."""
        hits, computed, next_key = self._cache.match(sequence)
        if next_key in cuts:
            return False
        self._pool.share(hits)
        fresh = self._config.layout.blocks_for(len(sequence.context)) - len(hits)
        if self._pool.available < fresh + self._headroom():
            self._pool.release(hits)
            return False
        blocks = self._pool.allocate(fresh)
        if blocks is None:
            raise InternalError("The pool refused blocks that it had said were available.")
        self._waiting.remove(sequence)
        sequence.blocks = hits + blocks
        sequence.computed = computed * self._config.block_size
        sequence.planned = len(hits) * self._config.block_size
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.cached_tokens = min(sequence.planned, len(sequence.task.prompt))
            sequence.found_tokens = sequence.cached_tokens
        last = min(sequence.fetchable, (len(sequence.context) - 1) // self._config.block_size)
        if last > len(hits) == computed:  # what is being computed need not be fetched
            sequence.fetchable = 0  # once: if it is preempted, the pool may still have it
            self._arrivals.begin(sequence, len(hits), last)
        else:
            self._running.add(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the line, with the answer so far as part of the context to compute."""
        self._send_back(sequence)
        sequence.preemptions += 1
        log.info(
            "%s makes way at %d tokens, for the %d. time: the KV pool is full.",
            sequence.task.attempt,
            len(sequence.context),
            sequence.preemptions,
        )

    def _undo_start(self, sequence: Sequence) -> None:
        """Back to the line: the KV that it was to share may never be computed."""
        self._send_back(sequence)
        if not sequence.preemptions:
            sequence.started_at = None

    def _send_back(self, sequence: Sequence) -> None:
        """No step may be using the sequence."""
        self._leave(sequence)
        sequence.computed = sequence.planned = 0
        self._waiting.add(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Stop running, or arriving. The blocks become free with the last step or transfer that
        writes to them."""
        if sequence in self._arrivals:
            self._arrivals.strand(sequence)
            return
        self._running.remove(sequence)
        self._pool.end_lease(sequence.blocks[: sequence.leased])
        sequence.leased = 0
        if sequence.steps:
            self._leaving[sequence.number] = sequence
        else:
            self._free(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """A step with a leaving sequence in it has ended."""
        if not sequence.steps:
            del self._leaving[sequence.number]
            self._free(sequence)
            self._settled = True

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = ()

    def _hand_off(self, sequence: Sequence) -> None:
        """From here on its blocks are held by the lease alone."""
        self._running.remove(sequence)
        self._pool.release(sequence.blocks)
        self._handed_off[sequence.task.attempt] = sequence
