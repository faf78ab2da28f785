"""Random transfers that sequences begin on before they have ended: right, wrong, late, too short;
with cancels at any time, and others who share the prompts."""

from __future__ import annotations

import asyncio
import random

import pytest

from baton.engine import gate
from baton.engine.events import KvWanted
from baton.types.request import FinishReason, GenerationTask
from tests.engine_rig import BLOCK, LAYERS, make_rig, make_task, running
from tests.fake_runner import FakeRunner, QueueRunner, expected_for

TASKS = 24


class Chaos:
    def __init__(self, seed: int, device: type[FakeRunner]) -> None:
        self.dice = random.Random(seed)
        self.rig = make_rig(
            num_blocks=24, layer_groups=2, max_batch_tokens=9, max_num_seqs=4, device=device
        )
        self.tasks = [self.task(number) for number in range(TASKS)]

    def task(self, number: int) -> GenerationTask:
        """Prompts begin alike, in some tenants."""
        sizes = self.dice.randint(1, 30), self.dice.randint(1, 5)
        task = make_task(f"t{number}", *sizes, salt=self.dice.choice("abcdef"))
        return GenerationTask(
            task.attempt, tuple(range(sizes[0])), task.sampling, cache_salt=task.cache_salt
        )

    async def run(self) -> None:
        async with running(self.rig), asyncio.timeout(60):
            tasks = list(self.tasks)
            while tasks:  # one alone begins early; others who come in between make it give way
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.dice.choice([1, 1, 2, 4]), len(tasks))):
                        group.create_task(self.serve(tasks.pop()))
                        await self.pause()
            await self.rig.until_idle()

    async def pause(self) -> None:
        for _ in range(self.dice.choice([0, 1, 10, 100])):
            await asyncio.sleep(0)

    async def serve(self, task: GenerationTask) -> None:
        heard, attempt = self.rig.heard, task.attempt
        self.rig.engine.submit(task, fetchable=self.dice.choice([0, 2, 9]))
        async with asyncio.TaskGroup() as group:
            if self.dice.random() < 0.3:
                group.create_task(self.cancel(task))
            await heard.until(lambda: attempt in heard.wanted or attempt in heard.finishes)
            if attempt in heard.wanted:
                await self.transfer(heard.wanted[attempt], task)
            await heard.finish(attempt)

    async def cancel(self, task: GenerationTask) -> None:
        for _ in range(4):
            await self.pause()
        self.rig.engine.cancel(task.attempt)

    async def transfer(self, wanted: KvWanted, task: GenerationTask) -> None:
        """Wrong KV is told of as if it were right, until it is said how many blocks came."""
        engine, all_blocks = self.rig.engine, len(wanted.blocks)
        good = all_blocks if self.dice.random() < 0.6 else self.dice.randrange(all_blocks)
        self.bring(wanted, task, good)
        for layer_end in (LAYERS // 2, LAYERS)[: self.dice.randint(0, 2)]:
            await self.pause()
            engine.layers_came(wanted.sequence, layer_end)
        await self.pause()
        engine.check_integrity()
        engine.arrived(wanted.sequence, good)

    def bring(self, wanted: KvWanted, task: GenerationTask, good: int) -> None:
        for index, block in enumerate(wanted.blocks):
            for slot in range(BLOCK):
                position = (wanted.first_block + index) * BLOCK + slot
                token = task.prompt[position] if index < good else -1
                self.rig.runner.memory.write(block, slot, position, token)

    def check_answers(self) -> int:
        """Every token is right; returns how many answers are complete."""
        heard = self.rig.heard
        assert FinishReason.ERROR not in {finish.reason for finish in heard.finishes.values()}
        answers = {task.attempt: expected_for(task) for task in self.tasks}
        for attempt, expected in answers.items():
            answer = heard.answers.get(attempt, [])
            assert answer == expected[: len(answer)]
        return sum(heard.answers.get(attempt) == answers[attempt] for attempt in answers)


@pytest.mark.parametrize("device", [FakeRunner, QueueRunner])
@pytest.mark.parametrize("patience_s", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
async def test_early_steps_leak_nothing_and_tell_nothing_wrong(
    seed: int, patience_s: float, device: type[FakeRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "PATIENCE_S", patience_s)
    chaos = Chaos(seed, device)
    await chaos.run()
    assert chaos.check_answers() >= TASKS // 3
