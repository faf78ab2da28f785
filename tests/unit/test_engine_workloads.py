"""Random workloads in tiny pools: right tokens, one ending each, books that agree at every step."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.batch import Batch, BatchResult
from baton.engine.scheduler import MAX_IN_FLIGHT, Advance
from baton.engine.sequence import Ending, Sequence
from baton.engine.waiting import Reservation
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, FinishReason, GenerationTask, SamplingParams, WireError
from tests.fake_runner import expected_answer
from tests.scheduler_rig import Rig, make_rig

FAILED = Ending(FinishReason.ERROR, WireError("internal_error", "a step failed"))
EOS = tuple(range(0, 997, 43))
MAX_LEN = 28


@dataclass(frozen=True)
class Plan:
    """One request of a random workload, and what happens to it."""

    at: int
    task: GenerationTask
    hand_off: bool
    cancel_at: int | None
    cancel_in_step: bool


def random_plan(dice: random.Random, index: int) -> Plan:
    start = 100 * dice.randrange(3)  # requests with the same start share a prefix
    prompt = tuple(range(start, start + dice.randint(1, 24)))
    params = SamplingParams(
        max_tokens=dice.randint(1, 20), seed=index, min_tokens=dice.choice((0, 0, 3))
    )
    answer = expected_answer(prompt, params, EOS, MAX_LEN)
    resumed = tuple(answer[: min(dice.choice((0, 0, 2)), len(answer) - 1)])
    salt = dice.choice(("", "", "", "tenant"))
    task = GenerationTask(
        AttemptId(str(index)),
        prompt,
        params,
        resumed,
        dice.randint(0, 2),
        cache_salt=salt,
        slack_s=dice.choice((0.0, 0.0, 1.0, 2.0)),
    )
    at = dice.choice((0, 5, dice.randint(0, 20)))  # many arrive together
    cancel_at = at + dice.randint(0, 30) if dice.random() < 0.25 else None
    return Plan(at, task, dice.random() < 0.25, cancel_at, dice.random() < 0.5)


class Workload:
    """Random requests, cancels, reservations and hand-offs on one rig."""

    def __init__(self, dice: random.Random) -> None:
        seqs = dice.randint(1, 6)
        self.dice = dice
        self.rig = make_rig(
            dice.randint(7, 14),
            max_num_seqs=seqs,
            max_batch_tokens=seqs + dice.randint(0, 20),
            max_model_len=MAX_LEN,
            eos_token_ids=EOS,
            prefix_caching=dice.random() < 0.7,
            max_prefill_tokens=dice.choice((None, 1, 5)),
            prompts_first=dice.random() < 0.3,
        )
        self.plans = [random_plan(dice, index) for index in range(dice.randint(1, 14))]
        self.live: list[tuple[Plan, Sequence]] = []
        self.reservations: list[Reservation] = []

    def run(self) -> None:
        for now in range(3000):
            self.arrive(now)
            self.cancel(now, in_step=False)
            worked = self.step(now)
            idle = not worked and not self.rig.handed and not self.reservations
            self.let_go()
            self.rig.scheduler.check_integrity()
            if now > 51 and idle:
                return
        raise AssertionError("the work never ends")

    def step(self, now: int) -> bool:
        """False when there was nothing to do."""
        batch = self.rig.schedule()
        self.cancel(now, in_step=True)
        if batch is not None:
            self.rig.commit(batch)
        return batch is not None

    def arrive(self, now: int) -> None:
        for plan in self.plans:
            if plan.at == now:
                self.live.append((plan, self.rig.submit(plan.task, plan.hand_off)))
        if now < 30 and self.dice.random() < 0.1:
            self.reservations.append(self.rig.reserve(self.dice.randint(1, 4)))

    def cancel(self, now: int, in_step: bool) -> None:
        for plan, sequence in self.live:
            if plan.cancel_at == now and plan.cancel_in_step == in_step:
                self.rig.cancel(sequence)

    def let_go(self) -> None:
        """Some leases end, some transfers are done with their blocks."""
        rig = self.rig
        for sequence in rig.handed[: self.dice.randint(0, 1)]:
            rig.handed.remove(sequence)
            if sequence.number not in rig.endings:
                ending = Ending(FinishReason.HANDED_OFF)
                assert rig.scheduler.remove(sequence, ending)
                rig.record((Advance(sequence, ending=ending),))
        for reservation in [r for r in self.reservations if self.dice.random() < 0.2]:
            if reservation.blocks and not reservation.quarantined and self.dice.random() < 0.3:
                rig.scheduler.quarantine(reservation)
            else:
                self.reservations.remove(reservation)
                rig.scheduler.drop_reservation(reservation)


class Ahead(Workload):
    """The same with up to two steps in flight. The device takes them up late, the results come
    late, the step behind is taken back now and then, and some fail."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__(dice)
        self.flights: list[Flight] = []
        self.failures = 0

    def step(self, now: int) -> bool:
        scheduled = len(self.flights) < MAX_IN_FLIGHT and self.schedule()
        busy = bool(self.flights)
        self.check_blocks()
        self.cancel(now, in_step=True)
        move = self.dice.random()
        if len(self.flights) == 2 and self.flights[1].result is None and move < 0.2:
            self.rig.record(self.rig.scheduler.withdraw(self.flights.pop().batch))
        elif self.flights and move < 0.25:
            self.fail()
        elif self.flights and (move < 0.7 or not scheduled):
            self.end()
        return busy

    def schedule(self) -> bool:
        batch = self.rig.scheduler.schedule(0.0)
        if batch is None:
            return False
        self.flights.append(Flight(batch))
        if len(self.flights) == 1:
            self.begin()
        return True

    def begin(self) -> None:
        """Nothing runs before the first flight any more."""
        self.rig.begin(self.flights[0].batch)

    def end(self) -> None:
        """The oldest step ends; the one behind it may have been computed as well by then."""
        for flight in self.flights[: self.dice.randint(1, 2)]:
            if flight.result is None:
                flight.result = self.rig.runner.launch(flight.batch).wait()
        oldest = self.flights.pop(0)
        assert oldest.result is not None
        self.rig.publish(self.rig.publisher.end())
        self.rig.record(self.rig.scheduler.commit(oldest.batch, oldest.result, 0.0))
        if self.flights:
            self.begin()

    def fail(self) -> None:
        """The oldest step fails, and the one behind it does not count."""
        self.failures += 1
        self.rig.publisher.abandon()
        self.rig.record(self.rig.scheduler.discard(self.flights.pop(0).batch, FAILED))
        for flight in self.flights:
            self.rig.record(self.rig.scheduler.withdraw(flight.batch))
        self.flights.clear()

    def check_blocks(self) -> None:
        """What a step in flight may write to, nobody else has."""
        owner: dict[int, int] = {}
        size = self.rig.config.block_size
        for item in (item for flight in self.flights for item in flight.batch.items):
            first, last = item.start // size, (item.start + item.length - 1) // size
            for block in item.blocks[first : last + 1]:
                assert owner.setdefault(block, item.sequence) == item.sequence
                assert self.rig.pool.state(block) in (BlockState.ACTIVE, BlockState.LEASED)
        for reservation in self.reservations:
            assert not owner.keys() & set(reservation.blocks)


@dataclass
class Flight:
    batch: Batch
    result: BatchResult | None = None  # None: the device has not taken it up


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32))
def test_steps_in_flight_change_no_answer(seed: int) -> None:
    """The tokens of one step at a time, whatever happens while others are in flight."""
    work = Ahead(random.Random(seed))
    work.run()
    rig = work.rig
    assert len(rig.endings) == len(work.plans), "everything ends"
    failed = 0
    for _, sequence in work.live:
        if rig.endings[sequence.number] is FAILED:
            failed += 1
            expected = expected_answer(
                sequence.task.prompt, sequence.task.sampling, EOS, MAX_LEN, sequence.task.output
            )
            answer = rig.answers[sequence.number]
            assert answer == expected[: len(answer)]
        else:
            check_answer(rig, sequence)
    assert failed == 0 or work.failures
    counts = dict(rig.pool.counts())
    assert counts[BlockState.FREE] + counts[BlockState.CACHED] == rig.pool.num_blocks


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_random_workloads_give_the_answers_of_an_idle_machine(seed: int) -> None:
    """Whatever is preempted, shared, cancelled or published: right tokens, one ending each."""
    work = Workload(random.Random(seed))
    work.run()
    rig = work.rig
    assert len(rig.endings) == len(work.plans), "everything ends"
    for _, sequence in work.live:
        check_answer(rig, sequence)
    counts = dict(rig.pool.counts())
    assert counts[BlockState.FREE] + counts[BlockState.CACHED] == rig.pool.num_blocks


def check_answer(rig: Rig, sequence: Sequence) -> None:
    task, ending = sequence.task, rig.endings[sequence.number]
    answer = rig.answers[sequence.number]
    expected = expected_answer(task.prompt, task.sampling, EOS, MAX_LEN, task.output)
    if ending.reason is FinishReason.HANDED_OFF:
        assert answer == expected[:1]
    elif ending.reason is FinishReason.CANCELLED:
        assert answer == expected[: len(answer)]
    else:
        assert ending.error is None
        assert answer == (expected[:1] if sequence.hand_off else expected)
        stopped = answer[-1] in EOS
        assert ending.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
