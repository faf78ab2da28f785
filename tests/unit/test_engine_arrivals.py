"""KV that sequences fetch from elsewhere, and KV that others read from the pool."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.block_pool import BlockPool
from baton.engine.events import KvWanted
from baton.engine.loans import Loans
from baton.errors import InternalError
from baton.types.fleet import BlockState
from baton.types.request import AttemptId, FinishReason, GenerationTask, SampledToken
from tests.engine_rig import BLOCK, Gate, Rig, make_rig, make_task, running
from tests.fake_runner import expected_for

X, Y = AttemptId("x"), AttemptId("y")


def bring(rig: Rig, wanted: KvWanted, task: GenerationTask, blocks: int) -> None:
    """What a transfer does to the engine's memory."""
    for index, block in enumerate(wanted.blocks[:blocks], wanted.first_block):
        for slot in range(BLOCK):
            position = index * BLOCK + slot
            rig.runner.memory.write(block, slot, position, task.prompt[position])


async def wanted_by(rig: Rig, attempt: AttemptId) -> KvWanted:
    await rig.heard.until(lambda: attempt in rig.heard.wanted)
    return rig.heard.wanted[attempt]


@pytest.mark.parametrize("came", [0, 1, 2, 3])
@pytest.mark.parametrize("hand_off", [False, True])
async def test_what_arrives_is_not_computed(came: int, hand_off: bool) -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", prompt_len=14)
        rig.engine.submit(task, hand_off, fetchable=3)
        wanted = await wanted_by(rig, X)
        assert (wanted.first_block, len(wanted.blocks), len(wanted.keys)) == (0, 3, 3 * 16)
        assert rig.engine.load().waiting_tokens == 14
        rig.engine.check_integrity()
        bring(rig, wanted, task, came)
        rig.engine.arrived(wanted.sequence, came)
        if hand_off:
            await rig.heard.until(lambda: X in rig.heard.prefilled)
            assert rig.heard.prefilled[X][2] == came * BLOCK
            assert rig.heard.ready[X][0].first_block == 0
            finish = rig.engine.release(X)
        else:
            finish = await rig.heard.finish(X)
            assert rig.heard.answers[X] == expected_for(task)
        assert finish is not None
        assert finish.cached_tokens == came * BLOCK
        assert [span.name for span in finish.spans][:3] == ["queue", "fetch", "prefill"]
        assert rig.runner.batches[0].items[0].start == came * BLOCK


async def test_hits_of_the_own_pool_come_first_and_the_last_token_is_computed() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", prompt_len=12)
        rig.engine.submit(make_task("x", prompt_len=5))
        await rig.heard.finish(X)
        rig.heard.finishes.clear()
        rig.engine.submit(task, fetchable=9)
        wanted = await wanted_by(rig, X)
        assert (wanted.first_block, len(wanted.blocks)) == (1, 1)  # not the block of the last token
        bring(rig, wanted, task, 1)
        rig.engine.arrived(wanted.sequence, 1)
        assert (await rig.heard.finish(X)).cached_tokens == 2 * BLOCK


async def test_pieces_of_a_prompt_are_offered_with_the_key_before_them():
    async with running(make_rig(max_batch_tokens=8)) as rig:
        rig.engine.submit(make_task("x", prompt_len=14))
        await rig.heard.finish(X)
        first, second = rig.heard.filled[:2]
        assert (first.first_block, len(first.keys), first.parent) == (0, 32, b"")
        assert (second.first_block, second.parent) == (2, first.keys[16:])


async def test_what_arrived_can_be_found_and_lent() -> None:
    async with running(make_rig()) as rig:
        task = make_task("x", prompt_len=14)
        rig.engine.submit(task, fetchable=3)
        wanted = await wanted_by(rig, X)
        bring(rig, wanted, task, 3)
        rig.engine.arrived(wanted.sequence, 3)
        await rig.heard.finish(X)
        keys = [wanted.keys[at : at + 16] for at in range(0, 48, 16)]
        assert rig.heard.filled[0].keys == wanted.keys
        assert wanted.keys in rig.engine.loans.take_changes()[0]
        blocks = rig.engine.loans.lend([*keys, b"unknown"])
        assert blocks == wanted.blocks
        assert rig.in_state(BlockState.LEASED) == 3
        rig.engine.check_integrity()
        rig.engine.loans.end(blocks[1:])
        rig.engine.loans.end(blocks[:1])


async def test_others_run_while_one_waits_for_its_kv() -> None:
    async with running(make_rig()) as rig:
        task, other = make_task("x", prompt_len=14), make_task("y")
        rig.engine.submit(task, fetchable=3)
        rig.engine.submit(other)
        wanted = await wanted_by(rig, X)
        await rig.heard.finish(Y)
        assert rig.heard.answers[Y] == expected_for(other)
        assert X not in rig.heard.finishes
        rig.engine.arrived(wanted.sequence, 0)
        await rig.heard.finish(X)
        assert rig.heard.answers[X] == expected_for(task)


@pytest.mark.parametrize("wait", [False, True])
async def test_a_cancelled_one_keeps_its_blocks_from_use_until_the_transfer_ends(
    wait: bool,
) -> None:
    async with running(make_rig()) as rig:
        rig.engine.submit(make_task("x", prompt_len=14), fetchable=3)
        wanted = await wanted_by(rig, X)
        rig.engine.cancel(X)
        assert (await rig.heard.finish(X)).reason is FinishReason.CANCELLED
        assert rig.in_state(BlockState.QUARANTINED) == 3
        rig.engine.check_integrity()
        if wait:  # the place is free, and the same attempt may even come again
            again = make_task("x", prompt_len=14)
            rig.heard.finishes.clear()
            rig.heard.answers.clear()
            rig.engine.submit(again)
            await rig.heard.finish(X)
            assert rig.heard.answers[X] == expected_for(again)
        rig.engine.arrived(wanted.sequence, 2)
        assert rig.in_state(BlockState.QUARANTINED) == 0


async def test_nobody_hears_of_what_was_cancelled_before() -> None:
    gate = Gate()
    async with running(make_rig(before_step=gate)) as rig:
        rig.engine.submit(make_task("y"))
        await gate.reached()
        rig.engine.submit(make_task("x", prompt_len=14), fetchable=3)
        rig.engine.cancel(X)
        gate.let.set()
        await rig.heard.finish(Y)
        assert X not in rig.heard.wanted
        assert rig.in_state(BlockState.QUARANTINED) == 0


async def test_more_than_was_wanted_cannot_arrive() -> None:
    async with running(make_rig()) as rig:
        rig.engine.submit(make_task("x", prompt_len=14), fetchable=1)
        wanted = await wanted_by(rig, X)
        with pytest.raises(InternalError, match="2 blocks arrived"):
            rig.engine.arrived(wanted.sequence, 2)
        rig.engine.arrived(wanted.sequence, 0)
        await rig.heard.finish(X)


@pytest.mark.parametrize("end", ["admit", "unreserve", "cancel"])
async def test_a_reservation_shares_what_is_here_already(end: str) -> None:
    async with running(make_rig(num_blocks=16)) as rig:
        rig.engine.submit(make_task("x", prompt_len=14))
        await rig.heard.finish(X)
        task = replace(make_task("x", prompt_len=18), attempt=Y)
        reserved = await rig.engine.reserve(Y, 18, 5, task=task)
        assert (len(reserved.blocks), reserved.cached) == (5, 3)
        rig.engine.check_integrity()
        if end == "admit":
            for position in range(3 * BLOCK, 18):
                block = reserved.blocks[position // BLOCK]
                rig.runner.memory.write(block, position % BLOCK, position, task.prompt[position])
            first = SampledToken(expected_for(task)[0], 0)
            rig.engine.admit(task, reserved.blocks, first)
            await rig.heard.finish(Y)
            assert [first.token_id, *rig.heard.answers[Y]] == expected_for(task)
        elif end == "unreserve":
            rig.engine.unreserve(Y)
        else:
            rig.engine.quarantine(Y)
            assert rig.in_state(BlockState.QUARANTINED) == 2
            rig.engine.check_integrity()
            rig.engine.end_quarantine(Y)


@given(st.lists(st.sampled_from(["register", "evict", "take"]), max_size=40), st.randoms())
@settings(max_examples=200)
def test_changes_lead_from_one_look_to_the_next(steps: list[str], chance: random.Random) -> None:
    pool, numbers = BlockPool(4), itertools.count()
    known: set[bytes] = set()

    def look() -> None:
        added, removed = pool.take_changes()
        for at in range(0, len(added), 16):
            assert added[at : at + 16] not in known
            known.add(added[at : at + 16])
        for at in range(0, len(removed), 16):
            known.remove(removed[at : at + 16])
        assert b"".join(sorted(known)) == b"".join(sorted(split(pool.keys())))

    for step in steps:
        if step == "take":
            look()
        elif step == "register":
            blocks = pool.allocate(1)
            assert blocks is not None
            number = chance.choice([next(numbers), chance.randrange(6)])
            pool.register(blocks[0], number.to_bytes(16, "big"))
            pool.release(blocks)
        else:
            blocks = pool.allocate(pool.available)
            assert blocks is not None
            pool.release(blocks)
    look()


def split(keys: bytes) -> list[bytes]:
    return [keys[at : at + 16] for at in range(0, len(keys), 16)]


def test_a_loan_ends_when_all_its_blocks_are_back() -> None:
    pool = BlockPool(4)
    returns: list[int] = []
    loans = Loans(pool, lambda: returns.append(1))
    blocks = pool.allocate(2)
    assert blocks is not None
    for block, key in zip(blocks, (b"a" * 16, b"b" * 16), strict=True):
        pool.register(block, key)
    pool.release(blocks)
    first, second = loans.lend([b"a" * 16, b"b" * 16]), loans.lend([b"a" * 16])
    assert (first, second) == (blocks, blocks[:1])
    assert loans.leases == {blocks[0]: 2, blocks[1]: 1}
    assert pool.available == 2
    loans.end(first)
    assert loans.leases == {blocks[0]: 1}
    loans.end(second)
    assert not loans.leases
    assert pool.available == 4
    assert len(returns) == 2
    pool.check_integrity()
