"""A scheduler that tests step by hand, with a fake runner behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.engine.batch import Batch
from baton.engine.block_pool import BlockPool
from baton.engine.config import EngineConfig
from baton.engine.events import KvReady
from baton.engine.publish import Publisher
from baton.engine.scheduler import Advance, Scheduler
from baton.engine.sequence import Ending, Sequence
from baton.engine.waiting import Reservation
from baton.types.request import AttemptId, FinishReason, GenerationTask, SamplingParams
from tests.fake_runner import FakeRunner, fake_layout

BLOCK = 4
CANCELLED = Ending(FinishReason.CANCELLED)


@dataclass
class Rig:
    """A scheduler, a publisher and a fake runner, stepped by hand."""

    config: EngineConfig
    steps: int = 0
    numbers: int = 0
    now: float = 0.0  # when steps are scheduled and committed
    answers: dict[int, list[int]] = field(default_factory=dict)
    endings: dict[int, Ending] = field(default_factory=dict)
    handed: list[Sequence] = field(default_factory=list)
    contexts: dict[AttemptId, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.config.num_blocks)
        self.scheduler = Scheduler(self.pool, self.config)
        self.publisher = Publisher(self.pool, self.config.layout)
        self.runner = FakeRunner(self.config.layout)

    def sequence(self, task: GenerationTask, hand_off: bool = False, now: float = 0.0) -> Sequence:
        self.numbers += 1
        sequence = Sequence(self.numbers, task, self.config.eos_token_ids, now, hand_off)
        self.answers[sequence.number] = []
        self.contexts[task.attempt] = (*task.prompt, *task.output)
        return sequence

    def submit(self, task: GenerationTask, hand_off: bool = False, now: float = 0.0) -> Sequence:
        sequence = self.sequence(task, hand_off, now)
        self.scheduler.enqueue(sequence)
        return sequence

    def reserve(self, num_blocks: int, priority: int = 0) -> Reservation:
        self.numbers += 1
        order = (priority, 0.0, self.numbers)
        attempt = AttemptId(f"reservation {self.numbers}")
        reservation = Reservation(self.numbers, attempt, num_blocks, order, lambda blocks: None)
        self.scheduler.enqueue(reservation)
        return reservation

    def schedule(self) -> Batch | None:
        batch = self.scheduler.schedule(self.now)
        if batch is not None:
            assert batch.num_tokens <= self.config.max_batch_tokens
            assert len(batch.items) <= self.config.max_num_seqs
            self.begin(batch)
        self.scheduler.check_integrity()
        return batch

    def commit(self, batch: Batch) -> tuple[Advance, ...]:
        result = self.runner.launch(batch).wait()
        self.publish(self.publisher.end())
        advances = self.scheduler.commit(batch, result, self.now)
        self.record(advances)
        self.scheduler.check_integrity()
        return advances

    def begin(self, batch: Batch) -> None:
        """Nothing runs before this step any more."""
        self.publish(self.publisher.begin(self.scheduler.to_publish(batch)))

    def publish(self, ready: tuple[KvReady, ...]) -> None:
        """Every published block is full of the attempt's own tokens, but perhaps its last one."""
        for one in ready:
            context = self.contexts[one.attempt]
            for index, block in enumerate(one.blocks, one.first_block):
                positions = range(index * BLOCK, min((index + 1) * BLOCK, len(context)))
                for slot, position in enumerate(positions):
                    found = self.runner.memory.read(block, slot)
                    assert found == (position, context[position]), "published before it was there"

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


def make_rig(num_blocks: int = 16, **values: int | bool | tuple[int, ...] | None) -> Rig:
    settings_: dict[str, object] = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_batch_tokens": 16,
        **values,
    }
    return Rig(EngineConfig(fake_layout(BLOCK), num_blocks, **settings_))  # type: ignore[arg-type]


def make_task(
    length: int,
    max_tokens: int = 4,
    start: int = 0,
    priority: int = 0,
    name: str = "",
    slack_s: float = 0.0,
) -> GenerationTask:
    return GenerationTask(
        AttemptId(name or f"{start}+{length}"),
        tuple(range(start, start + length)),
        SamplingParams(max_tokens=max_tokens, temperature=0),
        priority=priority,
        slack_s=slack_s,
    )


def shape(batch: Batch | None) -> list[tuple[int, int, int]]:
    """(sequence, start, tokens) of every item."""
    assert batch is not None
    return [(item.sequence, item.start, item.length) for item in batch.items]
