"""Decides what every step computes: continuous batching with chunked prefill (Orca, OSDI'22;
Sarathi-Serve, OSDI'24) over a paged pool (PagedAttention, SOSP'23).

One step, within a budget of tokens:
  1. decodes, one token each; one that finds no block preempts the last sequence of the line
  2. chunks of prompts that are already running, which a step that decodes may hold shorter; before
     each one, waiting sequences that are more urgent or due sooner: they overtake it
  3. waiting sequences and reservations, in order; the first that does not fit stops the line
With `prompts_first`, 2 and 3 come first, and 1 only where they found nothing to compute: prompts
are done sooner, and nothing bounds the time between two tokens.

Prompts that arrive together compute a shared prefix once: a sequence starts behind the blocks that
others fill in the same step, or in the one in flight, and reads them there (runners write a layer's
KV of all items before they attend to any). If its own first block would be the one that a prompt
which the step cuts short goes on with, it does not start yet, and the line stops; nor does it
overtake a prompt that is about to compute that block. That holds up nobody for long: running
prompts come first then, and while the line stops none is added to them. If a step does not count,
those who started on KV that they cannot count on any more go back to the line.

A step may be scheduled while the one before it is in flight. It takes for granted that every
sequence goes on, unless its length ends it; what a sequence computed after its end is thrown away.
Nobody is preempted while a step is in flight: first its result is waited for.

A step with nothing else to do may begin on KV that is still arriving, a layer group at a time: one
sequence alone, behind a gate (`gate.py`). Nobody can count on what it computes before all has come.

Why it always makes progress: the first running sequence (lowest priority number, then oldest) is
nobody's victim, a running prompt has all its blocks from the start, and every running decode and
the first running prompt get at least one token per step (max_batch_tokens >= max_num_seqs,
max_prefill_tokens >= 1). So the first one ends, and the next becomes first. Blocks held outside of
the line (reservations, leases) have deadlines of their own. Who is first may change, but not for
ever: whoever comes after a sequence is due does not come before it, priority aside. With
`prompts_first` decodes advance when no more prompt fits or none is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from baton.engine.batch import Batch, BatchItem, BatchResult
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.gate import Gate
from baton.engine.loans import Loans
from baton.engine.residents import Residents
from baton.engine.sequence import Ending, Sequence
from baton.errors import InternalError, Overloaded
from baton.types.request import FinishReason, SampledToken, WireError

MAX_IN_FLIGHT = 2
"""Steps that are scheduled and not committed: one that runs, and the one after it."""


class Advance(NamedTuple):
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
    sequences: list[Sequence] = field(default_factory=list)
    fills: list[bytes] = field(default_factory=list)  # see _Flight
    cuts: set[bytes] = field(default_factory=set)  # keys of what prompts go on with behind it
    spent: int = 0  # running sequences that have no part in it or any later one
    preempted: bool = False


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step between schedule and commit; sequences[i] is behind batch.items[i]."""

    batch: Batch
    sequences: tuple[Sequence, ...]
    fills: list[bytes]  # keys of the blocks that the prefix cache expects of it
    scheduled_at: float
    gate: Gate | None = None  # that it has to pass: the KV before it is still arriving

    def __iter__(self) -> Iterator[tuple[Sequence, BatchItem]]:
        return zip(self.sequences, self.batch.items, strict=True)


class Scheduler(Residents):
    """Steps are committed, discarded or withdrawn in the order in which they were scheduled, except
    that the last one may be withdrawn at any time."""

    def __init__(self, pool: BlockPool, config: EngineConfig, loans: Loans | None = None) -> None:
        super().__init__(pool, config, loans)
        self._flights: deque[_Flight] = deque()
        self._steps = 0
        self._committed_at = 0.0  # the last step

    # -- one step ---------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """The next step; None when there is nothing to compute, or nothing before the step in
        flight has been committed."""
        if len(self._flights) == MAX_IN_FLIGHT:
            raise InternalError(f"{MAX_IN_FLIGHT} steps are in flight already.")
        plan = _Plan(self._config.max_batch_tokens)
        if self._config.prompts_first:
            self._schedule_prompts(plan, now)
        if not plan.items and not self._schedule_decodes(plan):
            return None
        if not (self._config.prompts_first and plan.items):
            self._schedule_prompts(plan, now)
        self.grant_reservations()
        gate = None if plan.items else self._start_early(plan, now)
        if not plan.items:
            return None
        self._steps += 1
        batch = Batch(self._steps, tuple(plan.items))
        self._flights.append(_Flight(batch, tuple(plan.sequences), plan.fills, now, gate))
        return batch

    @property
    def in_flight(self) -> tuple[Batch, ...]:
        return tuple(flight.batch for flight in self._flights)

    def gate(self, batch: Batch) -> Gate | None:
        """What a batch in flight has to pass on its way."""
        return self._flight(batch).gate

    def to_publish(self, batch: Batch) -> tuple[tuple[Sequence, BatchItem], ...]:
        """The live sequences of a batch in flight that will be handed off, and whose KV is known to
        be good when the batch has been computed."""
        return tuple(
            (sequence, item)
            for sequence, item in self._flight(batch)
            if sequence.hand_off
            and sequence.number not in self._leaving
            and sequence not in self._arrivals
        )

    def commit(self, batch: Batch, result: BatchResult, now: float) -> tuple[Advance, ...]:
        """Advance every sequence of the batch by what was computed."""
        flight = self._land(batch)
        step_s = now - max(flight.scheduled_at, self._committed_at)  # it waits for the one before
        self._committed_at = now
        advances = []
        for (sequence, item), token in zip(flight, result.tokens, strict=True):
            sequence.steps -= 1
            if sequence.number in self._leaving:
                self._settle(sequence)
            else:
                advances.append(self._advance(sequence, item, token, now, step_s))
        return tuple(advances)

    def discard(self, batch: Batch, ending: Ending) -> tuple[Advance, ...]:
        """The step failed: end all its sequences. What it wrote is never found again."""
        advances = []
        for sequence, _ in self._land(batch):
            sequence.steps -= 1
            if sequence.number in self._leaving:
                self._settle(sequence)
            else:
                self._leave(sequence)
                advances.append(Advance(sequence, ending=sequence.ending or ending))
        return tuple(advances)

    def withdraw(self, batch: Batch) -> tuple[Advance, ...]:
        """The step was not run, or is to count as if it had not: its sequences go on from where
        they were, and those that were to end with it end."""
        advances = []
        for sequence, item in self._land(batch):
            sequence.steps -= 1
            if sequence.number in self._leaving:
                self._settle(sequence)
                continue
            sequence.planned = item.start
            sequence.coming -= item.sample is not None
            if sequence.steps:
                continue
            if sequence.ending is not None:
                self._leave(sequence)
                advances.append(Advance(sequence, ending=sequence.ending))
            elif sequence in self._arrivals:
                self._step_ended_early(sequence)
            elif sequence.computed != sequence.planned:
                self._undo_start(sequence)
        return tuple(advances)

    def check_integrity(self) -> None:
        """Raises InternalError unless every hold on a block, and every step, has its holder."""
        super().check_integrity()
        uses = sum(len(flight.sequences) for flight in self._flights)
        users = (*self._running, *self._leaving.values(), *self._arrivals)
        if sum(sequence.steps for sequence in users) != uses:
            raise InternalError("Sequences are in other steps than those in flight.")
        if self._cache.num_expected != sum(len(flight.fills) for flight in self._flights):
            raise InternalError("Other blocks are expected than those that steps in flight fill.")

    # -- scheduling -------------------------------------------------------------------------

    def _schedule_decodes(self, plan: _Plan) -> bool:
        """False when that has to wait for the step in flight."""
        decodes = self._decodes(plan)
        if decodes is None:
            return False
        for sequence in decodes:
            self._take_decode(plan, sequence)
        if decodes and self._config.max_prefill_tokens is not None:
            plan.budget = min(plan.budget, self._config.max_prefill_tokens)
        return True

    def _schedule_prompts(self, plan: _Plan, now: float) -> None:
        self._schedule_chunks(plan, now)
        if not plan.preempted or not plan.items:
            self._start_waiting(plan, now)

    def _decodes(self, plan: _Plan) -> list[Sequence] | None:
        """Who decodes, with a block for its token. None when one would have to preempt somebody
        while a step is in flight."""
        decodes = []
        for sequence in tuple(self._running):
            if sequence.spent:
                plan.spent += 1
            # A sequence that was preempted by one before it has no blocks any more.
            elif sequence.blocks and sequence.unplanned == 1:
                if not self._has_room(sequence):
                    if self._flights:
                        return None
                    if not self._make_room(sequence, plan):
                        continue
                decodes.append(sequence)
        return decodes

    def _schedule_chunks(self, plan: _Plan, now: float) -> None:
        """Of running prompts, and before each one of those that overtake it."""
        prompts = [s for s in self._running if s.unplanned > 1 and s.ending is None]
        if prompts and self._overtakes(prompts[-1]):
            ahead = (self._cache.key_at(sequence, sequence.planned) for sequence in prompts)
            plan.cuts.update(key for key in ahead if key is not None)
        for sequence in prompts:
            if not plan.preempted:
                self._start_waiting(plan, now, before=sequence)
            if plan.budget == 0:
                break
            self._take_chunk(plan, sequence)

    def _overtakes(self, sequence: Sequence) -> bool:
        head = self._waiting.first
        return head is not None and head.order < sequence.order

    def _start_waiting(self, plan: _Plan, now: float, before: Sequence | None = None) -> None:
        while plan.budget > 0:
            self.grant_reservations()  # first: it may take the last place
            head = self._waiting.first
            if not isinstance(head, Sequence) or not self._has_place(plan.spent):
                break
            if before is not None and head.order > before.order:
                break
            if not self._start(head, now, plan.cuts):
                break
            if head not in self._arrivals:
                self._take_chunk(plan, head)

    def _start_early(self, plan: _Plan, now: float) -> Gate | None:
        """Let a sequence begin whose KV is still arriving. What it fills is not expected: nobody
        may count on it."""
        if any(flight.gate is not None for flight in self._flights):
            return None  # whatever is put behind a step makes it wait no more
        early = self._arrivals.next_early()
        if early is None:
            return None
        sequence, filled, gate = early
        sequence.early_at = now
        sequence.planned = filled * self._config.block_size
        self._put_chunk(plan, sequence)
        return gate

    def _step_ended_early(self, sequence: Sequence) -> None:
        """Its step does not count, because not all of the KV before it came, or not soon enough."""
        sequence.early_at = None
        sequence.planned = sequence.computed
        filled = self._arrivals.step_ended(sequence)
        if filled is not None:
            self._run_arrived(sequence, filled)

    def _take_decode(self, plan: _Plan, sequence: Sequence) -> None:
        """Put the sequence's last token into the step, known or not."""
        follows = sequence.coming > 0
        plan.items.append(
            BatchItem(
                sequence.number,
                () if follows else (sequence.context[-1],),
                sequence.planned,
                sequence.blocks,
                sequence.sample_request(),
                follows,
            )
        )
        plan.sequences.append(sequence)
        plan.budget -= 1
        sequence.steps += 1
        sequence.planned += 1
        sequence.coming += 1

    def _take_chunk(self, plan: _Plan, sequence: Sequence) -> None:
        """Put the sequence's next known tokens into the step; others may share what it fills."""
        start = sequence.planned
        self._put_chunk(plan, sequence)
        end = sequence.planned
        plan.fills += self._cache.expect(sequence, start, end)
        if end < len(sequence.context) and (key := self._cache.key_at(sequence, end)) is not None:
            plan.cuts.add(key)

    def _put_chunk(self, plan: _Plan, sequence: Sequence) -> None:
        start, end = sequence.planned, self._chunk_end(sequence, plan.budget)
        completes = end == len(sequence.context)
        plan.items.append(
            BatchItem(
                sequence.number,
                tuple(sequence.context[start:end]),
                start,
                sequence.blocks,
                sequence.sample_request() if completes else None,
            )
        )
        plan.sequences.append(sequence)
        plan.budget -= end - start
        sequence.steps += 1
        sequence.planned = end
        sequence.coming += completes

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        """A chunk that does not end the context ends on a block boundary if it reaches one, so
        that no block is written by two steps."""
        end = sequence.planned + budget
        if end >= len(sequence.context):
            return len(sequence.context)
        aligned = end - end % self._config.block_size
        return aligned if aligned > sequence.planned else end

    def _has_room(self, sequence: Sequence) -> bool:
        """Make sure of a block for one more token, if that takes nobody else's."""
        if len(sequence.blocks) * self._config.block_size > sequence.planned:
            return True
        block = self._pool.allocate(1)
        if block is None:
            return False
        sequence.blocks += block
        return True

    def _make_room(self, sequence: Sequence, plan: _Plan) -> bool:
        """Preempt until there is a block. False when the sequence itself made way."""
        while not self._has_room(sequence):
            # Published KV stays where it is: a reader may be at it. `sequence` itself is not
            # published (it decodes here), so there always is a victim.
            victim = next(s for s in reversed(self._running) if s.leased == 0)
            self._preempt(victim)
            plan.preempted = True
            if victim is sequence:
                return False
        return True

    # -- committing -------------------------------------------------------------------------

    def _flight(self, batch: Batch) -> _Flight:
        for flight in self._flights:
            if flight.batch is batch:
                return flight
        raise InternalError(f"Step {batch.step} is not in flight.")

    def _land(self, batch: Batch) -> _Flight:
        flight = self._flight(batch)
        self._flights.remove(flight)
        self._cache.forget(flight.fills)
        return flight

    def _advance(
        self,
        sequence: Sequence,
        item: BatchItem,
        token: SampledToken | None,
        now: float,
        step_s: float,
    ) -> Advance:
        if sequence.first_token_at is None:
            sequence.prefill_s += step_s
        sequence.computed = item.start + item.length
        self._cache.register(sequence, item.start)
        if sequence.ending is not None:
            self._leave(sequence)
            return Advance(sequence, ending=sequence.ending)
        if token is None:
            return Advance(sequence)
        sequence.coming -= 1
        sequence.append(token, now)
        ending = self.ending_of(sequence) if sequence.may_end else None
        if ending is not None:
            self._leave(sequence)
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
