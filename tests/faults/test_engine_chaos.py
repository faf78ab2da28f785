"""Random tasks, moves and cancels over two small engines: right tokens, and nothing leaks."""

from __future__ import annotations

import asyncio
import random

import pytest

from baton.engine.events import KvReady
from baton.errors import Cancelled, StaleAttempt
from baton.types.request import AttemptId, FinishReason, GenerationTask
from tests.engine_rig import LAYERS, covered, make_rig, make_task, running
from tests.fake_runner import FakeRunner, QueueRunner, expected_for


class Chaos:
    """Two small engines, tasks that run on one or move between them, and cancels at any time."""

    def __init__(self, seed: int, device: type[FakeRunner]) -> None:
        self.dice = random.Random(seed)
        self.source = make_rig(
            num_blocks=14, layer_groups=2, max_batch_tokens=9, max_num_seqs=3, device=device
        )
        self.target = make_rig(num_blocks=13, max_batch_tokens=9, max_num_seqs=4, device=device)
        self.read: dict[tuple[AttemptId, int], dict[int, tuple[int, int]]] = {}
        self.tasks = [
            make_task(
                f"t{i}",
                self.dice.randint(1, 24),
                self.dice.randint(1, 16),
                salt=self.dice.choice(["", "tenant"]),
                seed=i,
            )
            for i in range(24)
        ]

    def transfer(self, ready: KvReady) -> None:
        """Read at once what is published: it must be final already."""
        if ready.layer_end == LAYERS:
            for index, block in enumerate(ready.blocks, ready.first_block):
                content = dict(self.source.runner.memory.blocks[block])
                self.read[ready.attempt, index] = content

    async def run(self) -> None:
        self.source.heard.on_ready = self.transfer
        async with running(self.source), running(self.target), asyncio.timeout(60):
            async with asyncio.TaskGroup() as group:
                for task in self.tasks:
                    group.create_task(self.disturb(group.create_task(self.serve(task)), task))
            await self.source.until_idle()
            await self.target.until_idle()

    async def disturb(self, serving: asyncio.Task[None], task: GenerationTask) -> None:
        if self.dice.random() < 0.4:
            for _ in range(self.dice.randint(0, 400)):
                await asyncio.sleep(0)
            if self.dice.random() < 0.5:
                serving.cancel()
            self.source.engine.cancel(task.attempt)
            self.target.engine.cancel(task.attempt)
        await asyncio.wait([serving])

    async def serve(self, task: GenerationTask) -> None:
        try:
            if self.dice.random() < 0.3:
                self.target.engine.submit(task)
                await self.target.heard.finish(task.attempt)
            else:
                await self.move(task)
        except (Cancelled, StaleAttempt):
            pass
        finally:
            self.source.engine.cancel(task.attempt)
            self.target.engine.cancel(task.attempt)
            self.target.engine.unreserve(task.attempt)

    async def move(self, task: GenerationTask) -> None:
        heard, attempt = self.source.heard, task.attempt
        self.source.engine.submit(task, hand_off=True)
        blocks, _ = await self.target.engine.reserve(attempt, len(task.prompt), 30)
        await heard.until(lambda: attempt in heard.prefilled or attempt in heard.finishes)
        if attempt in heard.finishes:
            return
        first, _, cached = heard.prefilled[attempt]
        assert len(covered(heard.ready[attempt])) == len(blocks) * LAYERS
        for index, block in enumerate(blocks):
            self.target.runner.memory.blocks[block] = self.read[attempt, index]
        self.source.engine.release(attempt)
        self.target.engine.admit(task, blocks, first, cached)
        await self.target.heard.finish(attempt)

    def check_answers(self) -> int:
        """Every token is right; returns how many answers are complete."""
        complete = 0
        for task in self.tasks:
            answer = self.source.heard.answers.get(task.attempt, [])
            answer = answer + self.target.heard.answers.get(task.attempt, [])
            expected = expected_for(task)
            assert answer == expected[: len(answer)]
            complete += answer == expected
        for rig in (self.source, self.target):
            assert FinishReason.ERROR not in {f.reason for f in rig.heard.finishes.values()}
        return complete


@pytest.mark.parametrize("device", [FakeRunner, QueueRunner])
@pytest.mark.parametrize("seed", range(8))
async def test_random_cancels_between_two_engines_leak_nothing(
    seed: int, device: type[FakeRunner]
) -> None:
    chaos = Chaos(seed, device)
    await chaos.run()
    assert chaos.check_answers() >= 6
