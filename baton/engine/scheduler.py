"""Decides what every step computes: continuous batching with chunked prefill (Orca, OSDI'22;
Sarathi-Serve, OSDI'24) over a paged pool (PagedAttention, SOSP'23).

One step, within a budget of tokens:
  1. decodes, one token each; one that finds no block preempts the last sequence of the line
  2. chunks of prompts that are already running
  3. waiting sequences and reservations, in order; the first that does not fit stops the line

Why it always makes progress: the first running sequence (lowest priority number, then oldest) is
nobody's victim, a running prompt has all its blocks from the start, and every running sequence gets
at least one token per step (max_batch_tokens >= max_num_seqs). So the first one ends, and the next
becomes first. Blocks held outside of the line (reservations, leases) have deadlines of their own.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from baton.engine.batch import Batch, BatchItem, BatchResult
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.prefix_cache import PrefixCache
from baton.engine.sequence import Ending, Sequence
from baton.engine.waiting import Line, Reservation, WaitingLine
from baton.errors import InternalError, Overloaded
from baton.types.fleet import WorkerLoad
from baton.types.request import AttemptId, FinishReason, SampledToken, WireError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did to a sequence. Without an ending, a sequence goes on or is handed off."""

    sequence: Sequence
    token: SampledToken | None = None
    ending: Ending | None = None
    handed_off: bool = False


@dataclass(slots=True)
class _Plan:
    """A step in the making."""

    budget: int
    items: list[BatchItem] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """Synchronous and torch-free; belongs to the event loop. Every block in the pool is held by a
    running sequence, a granted reservation or a handed-off sequence, or by nobody."""

    def __init__(self, pool: BlockPool, config: EngineConfig) -> None:
        self._pool = pool
        self._config = config
        self._cache = PrefixCache(pool, config.layout, config.prefix_caching)
        self._waiting = WaitingLine()
        self._running: Line[Sequence] = Line()
        self._granted: set[Reservation] = set()  # quarantined ones included
        self._handed_off: dict[AttemptId, Sequence] = {}
        self._in_step: dict[int, Sequence] = {}  # by number; between schedule and commit
        self._steps = 0

    # -- entering and leaving ---------------------------------------------------------------

    def enqueue(self, entry: Sequence | Reservation) -> None:
        """Raises Overloaded when the line is full."""
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} requests wait on this worker, which is its bound: retry "
                "later."
            )
        self._waiting.add(entry)
        self.grant_reservations()

    def admit(self, sequence: Sequence, reservation: Reservation, cached_tokens: int) -> None:
        """Run a sequence whose KV, all but the last token's, is in the reservation's blocks."""
        self._granted.remove(reservation)
        sequence.blocks, reservation.blocks = reservation.blocks, ()
        sequence.computed = len(sequence.context) - 1
        sequence.cached_tokens = cached_tokens
        self._cache.register(sequence, 0)
        self._running.add(sequence)

    def remove(self, sequence: Sequence, ending: Ending) -> bool:
        """Take a sequence out and free its blocks, wherever it is. False while a step is using
        it: then it leaves with that step's commit."""
        if sequence.number in self._in_step:
            sequence.ending = sequence.ending or ending
            return False
        if self._handed_off.pop(sequence.task.attempt, None) is not None:
            self._pool.end_lease(sequence.blocks)
        elif sequence.blocks:
            self._stop_running(sequence)
        else:
            self._waiting.remove(sequence)
        return True

    def drop_reservation(self, reservation: Reservation) -> None:
        """Free its blocks: nothing writes to them. It need not have been granted."""
        if reservation not in self._granted:
            self._waiting.remove(reservation)
            return
        self._granted.remove(reservation)
        if reservation.quarantined:
            self._pool.end_quarantine(reservation.blocks)
        else:
            self._pool.release(reservation.blocks)
        reservation.blocks = ()

    def quarantine(self, reservation: Reservation) -> None:
        """Keep the blocks of a granted reservation out of use until it is dropped."""
        if not reservation.quarantined:
            reservation.quarantined = True
            self._pool.quarantine(reservation.blocks)

    # -- one step ---------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """The next step, or None when there is nothing to compute. Commit it before the next."""
        if self._in_step:
            raise InternalError("A step was scheduled before the last one was committed.")
        plan = _Plan(self._config.max_batch_tokens)
        self._schedule_decodes(plan)
        self._schedule_chunks(plan)
        if not plan.preempted or not plan.items:
            self._start_waiting(plan, now)
        self.grant_reservations()
        if not plan.items:
            return None
        self._steps += 1
        return Batch(self._steps, tuple(plan.items))

    def scheduled(self, batch: Batch) -> tuple[tuple[Sequence, BatchItem], ...]:
        """The sequences behind a batch that has not been committed."""
        return tuple((self._in_step[item.sequence], item) for item in batch.items)

    def commit(self, batch: Batch, result: BatchResult, now: float) -> tuple[Advance, ...]:
        """Advance every sequence of the batch by what was computed."""
        return tuple(
            self._advance(item, token, now)
            for item, token in zip(batch.items, result.tokens, strict=True)
        )

    def discard(self, batch: Batch, ending: Ending) -> tuple[Advance, ...]:
        """The step failed: end all its sequences. What it wrote is never found again."""
        advances = []
        for item in batch.items:
            sequence = self._in_step.pop(item.sequence)
            self._stop_running(sequence)
            advances.append(Advance(sequence, ending=sequence.ending or ending))
        return tuple(advances)

    def grant_reservations(self) -> None:
        """Grant reservations at the head of the line as far as blocks and places go."""
        while (
            isinstance(head := self._waiting.first, Reservation)
            and self._has_place()
            and (blocks := self._allocate_for(head)) is not None
        ):
            self._waiting.remove(head)
            self._granted.add(head)
            head.blocks = blocks
            head.settle(blocks)

    # -- inspection -------------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        prefilling = sum(s.remaining for s in self._running if s.remaining > 1)
        return WorkerLoad(
            running=len(self._running) + len(self._granted) + len(self._handed_off),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.tokens + prefilling,
            blocks=self._pool.counts(),
        )

    def is_handed_off(self, attempt: AttemptId) -> bool:
        return attempt in self._handed_off

    def attempts(self) -> Counter[AttemptId]:
        """Every attempt that is here, once per place (so never more than once)."""
        sequences = (*self._running, *self._handed_off.values())
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
            if len(sequence.blocks) * self._config.block_size < sequence.computed:
                raise InternalError(f"{sequence.task.attempt} has more KV than blocks.")
            if sequence.remaining < 1:
                raise InternalError(f"{sequence.task.attempt} has nothing to compute.")
        for reservation in self._granted:
            if not reservation.quarantined:
                references.update(reservation.blocks)
        for sequence in self._handed_off.values():
            leases.update(sequence.blocks)
        self._pool.check_integrity(references, leases)
        waiting = sum(e.remaining for e in self._waiting if isinstance(e, Sequence))
        if waiting != self._waiting.tokens:
            raise InternalError(f"{waiting} tokens wait, {self._waiting.tokens} are counted.")

    # -- scheduling -------------------------------------------------------------------------

    def _schedule_decodes(self, plan: _Plan) -> None:
        for sequence in tuple(self._running):
            # A sequence that was preempted by one before it has no blocks any more.
            if sequence.blocks and sequence.remaining == 1 and self._grow(sequence, plan):
                self._take(plan, sequence)

    def _schedule_chunks(self, plan: _Plan) -> None:
        for sequence in self._running:
            if plan.budget == 0:
                break
            if sequence.number not in self._in_step:
                self._take(plan, sequence)

    def _start_waiting(self, plan: _Plan, now: float) -> None:
        while plan.budget > 0:
            self.grant_reservations()  # first: it may take the last place
            head = self._waiting.first
            if not isinstance(head, Sequence) or not self._has_place():
                break
            if not self._start(head, now):
                break
            self._take(plan, head)

    def _start(self, sequence: Sequence, now: float) -> bool:
        """Give a waiting sequence blocks for its whole context, or leave it waiting."""
        hits = self._cache.match(sequence)
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
        sequence.computed = len(hits) * self._config.block_size
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.cached_tokens = min(sequence.computed, len(sequence.task.prompt))
        self._running.add(sequence)
        return True

    def _take(self, plan: _Plan, sequence: Sequence) -> None:
        """Put the sequence's next tokens into the step."""
        start, end = sequence.computed, self._chunk_end(sequence, plan.budget)
        completes = end == len(sequence.context)
        plan.budget -= end - start
        plan.items.append(
            BatchItem(
                sequence=sequence.number,
                tokens=tuple(sequence.context[start:end]),
                start=start,
                blocks=sequence.blocks,
                sample=sequence.sample_request() if completes else None,
            )
        )
        self._in_step[sequence.number] = sequence

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        """A chunk that does not end the context ends on a block boundary if it reaches one, so
        that no block is written by two steps."""
        end = sequence.computed + budget
        if end >= len(sequence.context):
            return len(sequence.context)
        aligned = end - end % self._config.block_size
        return aligned if aligned > sequence.computed else end

    def _grow(self, sequence: Sequence, plan: _Plan) -> bool:
        """Make sure of a block for the last token. False when the sequence itself made way."""
        if len(sequence.blocks) * self._config.block_size >= len(sequence.context):
            return True
        while (block := self._pool.allocate(1)) is None:
            # Published KV stays where it is: a reader may be at it. `sequence` itself is not
            # published (it decodes here), so there always is a victim.
            victim = next(s for s in reversed(self._running) if s.leased == 0)
            self._preempt(victim)
            plan.preempted = True
            if victim is sequence:
                return False
        sequence.blocks += block
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the line, with the answer so far as part of the context to compute."""
        self._stop_running(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        log.info(
            "%s makes way at %d tokens, for the %d. time: the KV pool is full.",
            sequence.task.attempt,
            len(sequence.context),
            sequence.preemptions,
        )
        self._waiting.add(sequence)

    def _advance(self, item: BatchItem, token: SampledToken | None, now: float) -> Advance:
        sequence = self._in_step.pop(item.sequence)
        before, sequence.computed = sequence.computed, sequence.computed + len(item.tokens)
        self._cache.register(sequence, before)
        if sequence.ending is not None:
            self._stop_running(sequence)
            return Advance(sequence, ending=sequence.ending)
        if token is None:
            return Advance(sequence)
        sequence.append(token, now)
        ending = self.ending_of(sequence)
        if ending is not None:
            self._stop_running(sequence)
        elif sequence.hand_off:
            self._hand_off(sequence)
        return Advance(sequence, token, ending, handed_off=ending is None and sequence.hand_off)

    def ending_of(self, sequence: Sequence) -> Ending | None:
        """Whether the answer so far is all there can be."""
        reason = sequence.natural_end(self._config.max_model_len)
        if reason is not None:
            return Ending(reason)
        needed = self._config.layout.blocks_for(len(sequence.context))
        if needed <= self._pool.num_blocks or sequence.hand_off:
            return None
        message = (
            f"The answer outgrew this worker's KV pool of {self._pool.num_blocks} blocks: ask for "
            "fewer tokens or give the worker more blocks."
        )
        return Ending(FinishReason.ERROR, WireError(Overloaded.code, message))

    # -- blocks -----------------------------------------------------------------------------

    def _has_place(self) -> bool:
        return len(self._running) + self._reserved() < self._config.max_num_seqs

    def _reserved(self) -> int:
        """Reservations that will become running sequences."""
        return sum(not reservation.quarantined for reservation in self._granted)

    def _headroom(self) -> int:
        """Blocks that a newcomer leaves to the others: one for each that will grow, so that nobody
        is preempted as soon as it came."""
        return self._reserved() + sum(not sequence.hand_off for sequence in self._running)

    def _allocate_for(self, reservation: Reservation) -> tuple[int, ...] | None:
        if self._pool.available < reservation.num_blocks + self._headroom():
            return None
        return self._pool.allocate(reservation.num_blocks)

    def _stop_running(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.end_lease(sequence.blocks[: sequence.leased])
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.leased = (), 0

    def _hand_off(self, sequence: Sequence) -> None:
        """From here on its blocks are held by the lease alone."""
        self._running.remove(sequence)
        self._pool.release(sequence.blocks)
        self._handed_off[sequence.task.attempt] = sequence
