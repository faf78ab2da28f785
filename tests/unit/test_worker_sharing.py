"""Prefill and decode services that borrow one another's blocks."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.kv.transport.loopback import Fault
from baton.types.fleet import Peer
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import Cancel, FetchPart, Resync, StartDecode, StartPrefill
from baton.types.request import AttemptId, FinishReason, GenerationTask
from tests.unit.test_worker_services import expected, make_task, start
from tests.unit.worker_rig import DECODE, LAYOUT, Conductor, Pair, running_pair

DECODER = Peer("d", "d-life", DECODE)


def held(conductor: Conductor) -> set[bytes]:
    """What the link's worker has, from its messages."""
    known: set[bytes] = set()
    for message in conductor.news:
        if isinstance(message, KvSnapshot):
            known = set() if message.first else known
            known |= split(message.keys)
        else:
            assert isinstance(message, KvEvents)
            known = (known | split(message.added)) - split(message.removed)
    return known


def split(keys: bytes) -> set[bytes]:
    return {keys[at : at + 16] for at in range(0, len(keys), 16)}


def next_turn(pair: Pair, task: GenerationTask) -> GenerationTask:
    """Everything that was said, and a little more."""
    prompt = (*task.prompt, *pair.answer(task.attempt), 1, 2, 3)
    return replace(task, attempt=AttemptId(f"{task.attempt.request_id}-next"), prompt=prompt)


# The conductor names what the prefill worker lacks, or everything; 30 is more than there are.
@pytest.mark.parametrize(("first", "blocks"), [(0, 9), (0, 30), (7, 2), (7, 30)])
async def test_a_next_turn_takes_prompt_and_answer_from_the_decode_worker(
    first: int, blocks: int
) -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        again = next_turn(pair, task)  # 42 tokens; 38 have KV there, which is 9 full blocks
        fetch = (FetchPart(DECODER, first, blocks, Tier.GPU),)
        await pair.to_prefill.send(StartPrefill(again, fetch))
        await pair.to_decode.send(StartDecode(again, pair.peer))
        finish = await pair.to_decode.finish(again.attempt)
        assert finish.reason is FinishReason.LENGTH
        assert pair.answer(again.attempt) == expected(again)
        # Seven blocks are in the prefill worker's own pool; the decode worker has two more.
        assert finish.cached_tokens == 9 * 4
        computed = sum(item.length for batch in pair.prefill_runner.batches for item in batch.items)
        assert computed == 30 + 42 - 36


async def test_a_decode_worker_that_prefills_itself_borrows_too() -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        other = replace(task, attempt=AttemptId("y"), cache_salt="")
        source = FetchPart(pair.peer, 0, 7, Tier.GPU)
        await pair.to_decode.send(StartDecode(other, None, (source,)))
        finish = await pair.to_decode.finish(other.attempt)
        assert pair.to_decode.answer(other.attempt) == expected(other)
        assert finish.cached_tokens == 7 * 4


class Broken:
    """Every read of the prefill worker fails when half of it has come."""

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        return Fault(error="the cable was cut" if reader.startswith("p/") else None)


async def test_a_read_that_fails_is_computed_instead() -> None:
    async with running_pair(Broken()) as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        again = next_turn(pair, task)
        await pair.to_prefill.send(StartPrefill(again, (FetchPart(DECODER, 0, 9, Tier.GPU),)))
        await pair.to_decode.send(StartDecode(again, pair.peer))
        finish = await pair.to_decode.finish(again.attempt)
        assert pair.answer(again.attempt) == expected(again)
        assert finish.cached_tokens == 7 * 4  # of its own pool


async def test_what_cannot_be_fetched_is_computed() -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30)
        nobody = FetchPart(Peer("n", "n-life", "nowhere:1"), 0, 5, Tier.CPU)
        older = FetchPart(replace(DECODER, incarnation="before"), 5, 2, Tier.GPU)
        await pair.to_prefill.send(StartPrefill(task, (nobody, older)))
        await pair.to_decode.send(StartDecode(task, pair.peer))
        finish = await pair.to_decode.finish(task.attempt)
        assert finish.cached_tokens == 0
        assert pair.answer(task.attempt) == expected(task)


async def test_a_salt_shares_with_nobody() -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        other = replace(task, attempt=AttemptId("y"), cache_salt="mine")
        await pair.to_prefill.send(StartPrefill(other, (FetchPart(DECODER, 0, 7, Tier.GPU),)))
        await pair.to_decode.send(StartDecode(other, pair.peer))
        assert (await pair.to_decode.finish(other.attempt)).cached_tokens == 0


class Counting:
    """Counts what the decode worker reads."""

    nbytes = 0

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        self.nbytes += nbytes if reader.startswith("d/") else 0
        return Fault()


async def test_a_decode_worker_reads_only_what_it_lacks() -> None:
    reads = Counting()
    async with running_pair(reads) as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        before = reads.nbytes
        other = replace(task, attempt=AttemptId("y"), prompt=(*task.prompt[:25], 5, 6, 7, 8))
        await start(pair, other)
        await pair.to_decode.finish(other.attempt)
        assert pair.answer(other.attempt) == expected(other)
        assert reads.nbytes - before == 2 * LAYOUT.block_bytes  # of eight


async def test_conductors_hear_which_blocks_there_are_and_can_ask_again() -> None:
    async with running_pair() as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await start(pair, task)
        await pair.to_decode.finish(task.attempt)
        await pair.to_prefill.until(lambda: len(held(pair.to_prefill)) == 7)
        await pair.to_decode.until(lambda: len(held(pair.to_decode)) == 9)
        assert held(pair.to_prefill) < held(pair.to_decode)
        before = len(pair.to_decode.news)
        await pair.to_decode.send(Resync())
        await pair.to_decode.until(lambda: len(pair.to_decode.news) > before)
        assert isinstance(pair.to_decode.news[-1], KvSnapshot)
        numbers = [message.number for message in pair.to_decode.news]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


class Slow:
    """Reads that take long, and say that they have begun."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()

    def on_read(self, reader: str, source: str, nbytes: int) -> Fault:
        self.begun.set()
        return Fault(delay_s=0.3)


async def test_who_is_cancelled_while_fetching_leaves_nothing_behind() -> None:
    slow = Slow()
    async with running_pair(slow) as pair:
        task = make_task("x", prompt_len=30, max_tokens=9)
        await pair.to_prefill.send(StartPrefill(task))
        await pair.to_prefill.until(lambda: len(held(pair.to_prefill)) == 7)
        await pair.to_prefill.send(Cancel(task.attempt, "enough"))
        other = replace(task, attempt=AttemptId("y"))
        source = FetchPart(pair.peer, 0, 7, Tier.GPU)
        await pair.to_decode.send(StartDecode(other, None, (source,)))
        async with asyncio.timeout(20):
            await slow.begun.wait()
        await pair.to_decode.send(Cancel(other.attempt, "enough"))
        finish = await pair.to_decode.finish(other.attempt)
        assert finish.reason is FinishReason.CANCELLED
