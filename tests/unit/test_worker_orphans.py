"""Orphans in a whole decode worker: their answers are those of an untroubled run, their blocks
come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from baton.engine.batch import Batch
from baton.types.fleet import BlockState
from baton.types.link import Adopt, StartDecode
from baton.types.request import FinishReason
from tests.unit.test_worker_services import Gate, expected, make_task, start
from tests.unit.worker_rig import DECODE, Conductor, Pair, running_pair


@asynccontextmanager
async def another_conductor(pair: Pair) -> AsyncIterator[Conductor]:
    conductor = Conductor(await pair.network.worker_dialer("other").link(DECODE, 1.0))
    listening = asyncio.create_task(conductor.listen())
    try:
        yield conductor
    finally:
        await conductor.stream.aclose()
        await listening


@pytest.mark.parametrize("alone", [True, False])
async def test_an_adopted_answer_is_whole(alone: bool) -> None:
    """From its first token, which a prefill worker has computed (or the decode worker `alone`)."""
    async with running_pair() as pair, another_conductor(pair) as other:
        task = make_task("t", max_tokens=120)
        if alone:
            await pair.to_decode.send(StartDecode(task))
        else:
            await start(pair, task)
        await pair.to_decode.token(task.attempt)
        await pair.to_decode.stream.aclose()
        await other.send(Adopt(task.attempt))
        assert (await other.finish(task.attempt)).reason is FinishReason.LENGTH
        assert other.answer(task.attempt) == expected(task)


async def test_an_adopted_resumed_answer_is_whole_too() -> None:
    async with running_pair() as pair, another_conductor(pair) as other:
        whole = expected(make_task("t", max_tokens=100))
        task = make_task("t", max_tokens=100, output=tuple(whole[:7]))
        await start(pair, task)
        await pair.to_decode.token(task.attempt)
        await pair.to_decode.stream.aclose()
        await other.send(Adopt(task.attempt))
        assert (await other.finish(task.attempt)).reason is FinishReason.LENGTH
        assert other.answer(task.attempt) == whole


class Stall:
    """Holds an engine's steps from the third on, until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self._steps = 0

    def __call__(self, batch: Batch) -> None:
        self._steps += 1
        assert self._steps <= 2 or self.opened.wait(20)


async def test_the_blocks_of_an_orphan_come_back_when_its_time_is_over() -> None:
    stall = Stall()
    async with running_pair(before_decode=stall, orphan_timeout_s=0.05) as pair:
        task = make_task("t", max_tokens=150)
        await start(pair, task)
        await pair.to_decode.token(task.attempt)
        await pair.to_decode.stream.aclose()
        await pair.decode.links.wait_idle()
        assert pair.decode.load().blocks_in(BlockState.ACTIVE) > 0
        stall.opened.set()
        await pair.until_idle()
        async with another_conductor(pair) as other:
            await other.send(Adopt(task.attempt))
            finish = await other.finish(task.attempt)
            assert finish.error is not None
            assert finish.error.code == "worker_lost"
            answer = other.answer(task.attempt)
            assert answer == expected(task)[: len(answer)]
            assert len(answer) >= 2


async def test_an_attempt_that_is_being_taken_over_is_no_orphan() -> None:
    gate = Gate()
    async with running_pair(before_prefill=gate) as pair:
        task = make_task("t")
        await start(pair, task)
        await gate.reached()
        await pair.to_decode.stream.aclose()
        async with another_conductor(pair) as other:
            await other.send(Adopt(task.attempt))
            finish = await other.finish(task.attempt)
            assert finish.error is not None
            assert finish.error.code == "unknown_attempt"
        gate.opened.set()
        await pair.until_idle()
        assert pair.decode.load().blocks_in(BlockState.ACTIVE) == 0
