"""The scheduler without a loop: what a step contains, and random workloads in tiny pools."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.batch import Batch
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.publish import Publisher
from baton.engine.scheduler import Advance, Scheduler
from baton.engine.sequence import Ending, Sequence
from baton.engine.waiting import Line, Reservation, WaitingLine
from baton.errors import ConfigError, InternalError, InvalidRequest, Overloaded
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, FinishReason, GenerationTask, SamplingParams
from tests.fake_runner import FakeRunner, expected_answer, fake_layout

BLOCK = 4
CANCELLED = Ending(FinishReason.CANCELLED)


@dataclass
class Rig:
    """A scheduler, a publisher and a fake runner, stepped by hand."""

    config: EngineConfig
    steps: int = 0
    numbers: int = 0
    answers: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, Ending] = field(default_factory=dict)
    handed: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.config.num_blocks)
        self.scheduler = Scheduler(self.pool, self.config)
        self.publisher = Publisher(self.pool, self.config.layout)
        self.runner = FakeRunner(self.config.layout)

    def sequence(self, task: GenerationTask, hand_off: bool = False) -> Sequence:
        self.numbers += 1
        sequence = Sequence(self.numbers, task, self.config.eos_token_ids, 0.0, hand_off)
        self.answers[sequence.number] = []
        return sequence

    def submit(self, task: GenerationTask, hand_off: bool = False) -> Sequence:
        sequence = self.sequence(task, hand_off)
        self.scheduler.enqueue(sequence)
        return sequence

    def reserve(self, num_blocks: int, priority: int = 0) -> Reservation:
        self.numbers += 1
        order = (priority, self.numbers)
        attempt = AttemptId(f"reservation {self.numbers}")
        reservation = Reservation(self.numbers, attempt, num_blocks, order, lambda blocks: None)
        self.scheduler.enqueue(reservation)
        return reservation

    def schedule(self) -> Batch | None:
        batch = self.scheduler.schedule(0.0)
        if batch is not None:
            assert batch.num_tokens <= self.config.max_batch_tokens
            assert len(batch.items) <= self.config.max_num_seqs
            self.publisher.begin(self.scheduler.scheduled(batch))
        self.scheduler.check_integrity()
        return batch

    def commit(self, batch: Batch) -> tuple[Advance, ...]:
        result = self.runner.execute(batch)
        self.publisher.end()
        advances = self.scheduler.commit(batch, result, 0.0)
        self.record(advances)
        self.scheduler.check_integrity()
        return advances

    def step(self) -> Batch | None:
        batch = self.schedule()
        if batch is not None:
            self.commit(batch)
        return batch

    def record(self, advances: tuple[Advance, ...]) -> None:
        for advance in advances:
            number = advance.sequence.number
            assert number not in self.endings, "something happened after the end"
            if advance.token is not None:
                assert advance.token.index == len(self.answers[number]) + len(
                    advance.sequence.task.output
                )
                self.answers[number].append(advance.token.token_id)
            if advance.ending is not None:
                self.endings[number] = advance.ending
            if advance.handed_off:
                self.handed.append(advance.sequence)

    def cancel(self, sequence: Sequence) -> None:
        if sequence.number not in self.endings and self.scheduler.remove(sequence, CANCELLED):
            self.record((Advance(sequence, ending=CANCELLED),))

    def drain(self, limit: int = 2000) -> None:
        for _ in range(limit):
            if self.step() is None:
                return
        raise AssertionError("the work never ends")


def make_rig(num_blocks: int = 16, **values: int | bool | tuple[int, ...]) -> Rig:
    settings_: dict[str, object] = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_batch_tokens": 16,
        **values,
    }
    return Rig(EngineConfig(fake_layout(BLOCK), num_blocks, **settings_))  # type: ignore[arg-type]


def make_task(
    length: int, max_tokens: int = 4, start: int = 0, priority: int = 0, name: str = ""
) -> GenerationTask:
    return GenerationTask(
        AttemptId(name or f"{start}+{length}"),
        tuple(range(start, start + length)),
        SamplingParams(max_tokens=max_tokens, temperature=0),
        priority=priority,
    )


def shape(batch: Batch | None) -> list[tuple[int, int, int]]:
    """(sequence, start, tokens) of every item."""
    assert batch is not None
    return [(item.sequence, item.start, len(item.tokens)) for item in batch.items]


# -- what a step contains -------------------------------------------------------------------


def test_chunks_share_the_budget_and_end_on_block_boundaries() -> None:
    rig = make_rig(max_batch_tokens=10)
    rig.submit(make_task(14))
    rig.submit(make_task(5, start=100))
    assert shape(rig.step()) == [(1, 0, 8), (2, 0, 2)]  # too little is left to reach a boundary
    assert shape(rig.step()) == [(1, 8, 6), (2, 2, 3)]
    assert shape(rig.step()) == [(1, 14, 1), (2, 5, 1)]


def test_decodes_come_first() -> None:
    rig = make_rig(max_batch_tokens=8)
    rig.submit(make_task(20))
    rig.step()
    rig.submit(make_task(3, start=100, priority=-1))
    assert shape(rig.step()) == [(1, 8, 8)]  # nothing is left for the newcomer
    assert shape(rig.step()) == [(1, 16, 4), (2, 0, 3)]
    rig.submit(make_task(9, start=200, priority=-2))
    assert shape(rig.step()) == [(2, 3, 1), (1, 20, 1), (3, 0, 4)]


def test_priority_then_arrival() -> None:
    rig = make_rig(max_num_seqs=1)
    for number, priority in enumerate([5, 0, 0, -3]):
        rig.submit(make_task(4, max_tokens=1, start=100 * number, priority=priority))
    order = [shape(rig.step())[0][0] for _ in range(4)]
    assert order == [4, 2, 3, 1]


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    rig = make_rig()
    rig.submit(make_task(12, max_tokens=1))
    rig.drain()
    again = rig.submit(make_task(12, max_tokens=5, name="again"))
    assert shape(rig.step()) == [(2, 8, 4)]
    assert again.cached_tokens == 8
    longer = rig.submit(make_task(13, max_tokens=1, name="longer"))
    assert shape(rig.step()) == [(2, 12, 1), (3, 12, 1)]
    assert longer.cached_tokens == 12
    rig.drain()


def test_another_salt_shares_nothing_and_the_cache_can_be_off() -> None:
    rig = make_rig()
    rig.submit(make_task(12, max_tokens=1))
    rig.drain()
    other = rig.submit(replace(make_task(12, max_tokens=1, name="other"), cache_salt="tenant"))
    assert shape(rig.step()) == [(2, 0, 12)]
    assert other.cached_tokens == 0
    rig = make_rig(prefix_caching=False)
    for number in range(2):
        rig.submit(make_task(12, max_tokens=1, name=str(number)))
        assert shape(rig.step())[0][1:] == (0, 12)
    assert dict(rig.pool.counts())[BlockState.FREE] == 16


def test_a_running_sequence_already_lends_its_prompt() -> None:
    rig = make_rig()
    first = rig.submit(make_task(9))
    rig.step()
    second = rig.submit(make_task(9, name="second"))
    rig.step()
    assert second.cached_tokens == 8
    assert first.blocks[:2] == second.blocks[:2]
    assert first.blocks[2] != second.blocks[2]
    rig.drain()
    assert rig.answers[1] == rig.answers[2]


def test_twins_that_compute_the_same_at_once_do_no_harm() -> None:
    rig = make_rig(max_batch_tokens=32)
    rig.submit(make_task(12))
    rig.submit(make_task(12, name="twin"))
    rig.drain()
    assert rig.answers[1] == rig.answers[2]
    assert dict(rig.pool.counts())[BlockState.CACHED] == 3


def test_growth_preempts_the_youngest_of_the_lowest_priority() -> None:
    rig = make_rig(num_blocks=8, max_batch_tokens=32)
    tasks = [make_task(4, 16, 100 * n, priority=n % 2) for n in range(4)]
    sequences = [rig.submit(task) for task in tasks]
    while not any(sequence.preemptions for sequence in sequences):
        assert rig.step() is not None
    assert sequences[3].preemptions == 1
    rig.drain()
    assert sequences[0].preemptions == 0, "the first one is nobody's victim"
    for sequence, task in zip(sequences, tasks, strict=True):
        assert rig.answers[sequence.number] == expected_answer(task.prompt, task.sampling)


def test_published_sequences_are_never_preempted() -> None:
    rig = make_rig(num_blocks=7, max_batch_tokens=8)
    decode = rig.submit(make_task(4, 16))
    rig.step()
    published = rig.submit(make_task(16, 2, 100, priority=9), hand_off=True)
    for _ in range(6):
        rig.step()
    assert (published.leased, published.preemptions) == (4, 0)
    rig.drain()
    assert decode.preemptions > 0
    assert decode.number not in rig.endings, "it waits for the lease to end"
    rig.scheduler.remove(published, Ending(FinishReason.HANDED_OFF))
    rig.drain()
    assert rig.endings[decode.number].reason is FinishReason.LENGTH


def test_an_answer_that_outgrows_the_pool_ends_with_an_error() -> None:
    rig = make_rig(num_blocks=3)
    rig.submit(make_task(4, 60))
    rig.drain()
    ending = rig.endings[1]
    assert ending.reason is FinishReason.ERROR
    assert ending.error is not None
    assert "3 blocks" in ending.error.message
    assert len(rig.answers[1]) == 9  # 4 + 8 tokens have their KV in the pool; one more was sampled


def test_the_context_length_ends_an_answer() -> None:
    rig = make_rig(max_model_len=10)
    rig.submit(make_task(6, 60))
    rig.drain()
    assert rig.endings[1].reason is FinishReason.LENGTH
    assert len(rig.answers[1]) == 4


def test_penalties_see_prompt_and_answer() -> None:
    rig = make_rig()
    task = make_task(5, 5)
    task = replace(task, sampling=replace(task.sampling, repetition_penalty=1.5))
    rig.submit(task)
    batch = rig.schedule()
    assert batch is not None
    assert batch.items[0].sample is not None
    assert batch.items[0].sample.prompt == task.prompt
    rig.commit(batch)
    rig.drain()
    assert rig.answers[1] == expected_answer(task.prompt, task.sampling)


# -- reservations ---------------------------------------------------------------------------


def test_reservations_wait_in_line_with_sequences() -> None:
    rig = make_rig(num_blocks=4)
    running = rig.submit(make_task(12, 4))
    rig.step()
    first = rig.reserve(3)
    behind = rig.submit(make_task(4, 1, 100))
    small = rig.reserve(1)
    assert (first.blocks, small.blocks) == ((), ())
    rig.step()
    assert not behind.blocks, "nobody overtakes the head of the line"
    rig.cancel(running)
    rig.schedule()
    assert len(first.blocks) == 3
    rig.scheduler.drop_reservation(first)
    rig.drain()
    assert len(small.blocks) == 1
    assert rig.endings[behind.number].reason is FinishReason.LENGTH


def test_reservations_count_as_places() -> None:
    rig = make_rig(max_num_seqs=2)
    one, two, three = rig.reserve(1), rig.reserve(1), rig.reserve(1)
    assert [len(r.blocks) for r in (one, two, three)] == [1, 1, 0]
    rig.scheduler.quarantine(one)
    rig.scheduler.grant_reservations()
    assert len(three.blocks) == 1
    assert dict(rig.pool.counts())[BlockState.QUARANTINED] == 1
    for reservation in (one, two, three):
        rig.scheduler.drop_reservation(reservation)
    rig.scheduler.check_integrity()


def test_a_full_line_refuses() -> None:
    rig = make_rig(num_blocks=1, max_waiting=2)
    rig.submit(make_task(4, 1))
    rig.submit(make_task(4, 1, 100))
    with pytest.raises(Overloaded, match="2 requests"):
        rig.submit(make_task(4, 1, 200))
    with pytest.raises(Overloaded):
        rig.reserve(1)
    rig.drain()


# -- books ----------------------------------------------------------------------------------


def test_one_step_at_a_time() -> None:
    rig = make_rig()
    rig.submit(make_task(4))
    batch = rig.schedule()
    assert batch is not None
    with pytest.raises(InternalError, match="before the last one"):
        rig.scheduler.schedule(0.0)
    rig.commit(batch)


def test_the_check_sees_holds_without_a_holder() -> None:
    rig = make_rig()
    rig.pool.allocate(1)
    with pytest.raises(InternalError, match="holders"):
        rig.scheduler.check_integrity()


def test_load_counts_what_is_left_to_compute() -> None:
    rig = make_rig(max_num_seqs=1, max_batch_tokens=4)
    rig.submit(make_task(10))
    rig.submit(make_task(7, start=100))
    rig.step()
    load = rig.scheduler.load()
    assert (load.running, load.waiting, load.waiting_tokens) == (1, 1, 6 + 7)
    assert load.blocks_in(BlockState.ACTIVE) == 3
    assert sum(count for _, count in load.blocks) == 16


def test_lines_know_their_members() -> None:
    line: Line[Sequence] = Line()
    one, two = (Sequence(n, make_task(3), (), 0.0) for n in (1, 2))
    line.add(two)
    line.add(one)
    assert [*line] == [one, two]
    line.remove(two)
    with pytest.raises(ValueError, match="not in the line"):
        line.remove(two)
    assert (len(line), line.first) == (1, one)
    assert WaitingLine().first is None


@pytest.mark.parametrize(
    "wrong",
    [{"max_batch_tokens": 3}, {"max_num_seqs": 0}, {"max_model_len": 0}, {"layer_groups": 0}],
)
def test_a_configuration_that_cannot_work_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        make_rig(**wrong)


def test_what_can_never_fit_is_refused() -> None:
    config = make_rig(num_blocks=4, max_model_len=18).config
    config.require_fit(make_task(16))
    for task in (
        make_task(0),
        make_task(18),
        make_task(17),
        replace(make_task(9), output=(1,) * 8),
    ):
        with pytest.raises(InvalidRequest) as raised:
            config.require_fit(task)
        assert raised.value.param == "prompt"


# -- random workloads -----------------------------------------------------------------------

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
    task = GenerationTask(AttemptId(str(index)), prompt, params, resumed, dice.randint(0, 2))
    at = dice.randint(0, 20)
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
        )
        self.plans = [random_plan(dice, index) for index in range(dice.randint(1, 14))]
        self.live: list[tuple[Plan, Sequence]] = []
        self.reservations: list[Reservation] = []

    def run(self) -> None:
        for now in range(3000):
            self.arrive(now)
            self.cancel(now, in_step=False)
            batch = self.rig.schedule()
            self.cancel(now, in_step=True)
            if batch is not None:
                self.rig.commit(batch)
            idle = batch is None and not self.rig.handed and not self.reservations
            self.let_go()
            self.rig.scheduler.check_integrity()
            if now > 51 and idle:
                return
        raise AssertionError("the work never ends")

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
