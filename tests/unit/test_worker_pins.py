"""`cache_pin_s` from a worker's start to the store: whole prompts stay, however they got there."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from baton.hashing import block_keys, root_key
from baton.kv.blocks.options import BlocksOptions
from baton.kv.identity import Identity
from baton.kv.transport.loopback import LoopbackFabric, LoopbackTransport
from baton.kv.transport.shared import SharedTransport
from baton.types.kv_events import Tier
from baton.types.link import Cancel, StartDecode, StartPrefill
from baton.types.request import AttemptId, AttemptOutput, FinishReason, GenerationTask, SampledToken
from baton.worker.pinning import PromptPins
from kvstore.eviction import make_policy
from kvstore.format import fingerprint
from kvstore.journal import Journal
from kvstore.memory_tier import MemoryTier
from kvstore.service import StoreService
from kvstore.slot_table import HEADER_BYTES, SlotTable
from kvstore.store import Store
from tests.fake_worker import wait_for
from tests.unit.kvstore_kit import chain_of
from tests.unit.test_worker_services import expected, make_task, start
from tests.unit.worker_rig import LAYOUT, Pair, running_pair

STORE = "store:1"
SLOTS = 32
FULL_BLOCKS = 7  # of a prompt of 30 tokens
PINNED = make_task("x", prompt_len=30, max_tokens=2)
PINNED = replace(PINNED, cache_pin_s=60.0)


def keys_of(task: GenerationTask) -> list[bytes]:
    root = root_key(LAYOUT.model, LAYOUT.dtype, LAYOUT.block_size, LAYOUT.quantization)
    return block_keys(root, task.prompt, LAYOUT.block_size)


@dataclass
class Rig:
    pair: Pair
    store: Store

    def flood(self) -> None:
        for key in chain_of(1000, 4 * SLOTS):
            if self.store.begin_puts([key]) != [None]:
                self.store.commit_put(key)


@asynccontextmanager
async def with_store() -> AsyncIterator[Rig]:
    """Two workers and their node's store, in one process."""
    fabric = LoopbackFabric()
    transport = LoopbackTransport("s/s-life", fabric)
    await transport.start()
    memory = transport.allocate(SLOTS * LAYOUT.block_bytes)
    headers = memoryview(bytearray(SLOTS * HEADER_BYTES))
    journal = Journal()
    tier = MemoryTier(
        memoryview(memory.buffer).cast("B"),  # type: ignore[arg-type]
        SlotTable(headers, fingerprint(LAYOUT), LAYOUT.block_bytes),
        LAYOUT.block_bytes,
        make_policy("lru"),
        journal.of(Tier.CPU),
    )
    store = Store(tier, None, journal)
    identity = Identity("s", "s-life", LAYOUT)
    service = StoreService(
        store, tier, identity, SharedTransport(transport), memory, BlocksOptions()
    )
    async with running_pair(fabric=fabric, store=STORE) as pair:
        pair.network.add_blocks(STORE, service.blocks)
        yield Rig(pair, store)
        await service.aclose()
        store.check_integrity()
    await transport.close()


async def test_a_pinned_prompt_stays_in_the_store_whatever_comes() -> None:
    async with with_store() as rig:
        await start(rig.pair, PINNED)
        await rig.pair.to_decode.finish(PINNED.attempt)
        await wait_for(lambda: rig.store.figures().pinned == FULL_BLOCKS)
        await wait_for(lambda: rig.store.figures().stored >= FULL_BLOCKS)
        rig.flood()
        assert rig.store.lookup(keys_of(PINNED)) == [Tier.CPU] * FULL_BLOCKS


async def test_blocks_that_the_store_and_the_pool_have_already_are_pinned_too() -> None:
    async with with_store() as rig:
        first = replace(PINNED, cache_pin_s=None)
        await start(rig.pair, first)
        await rig.pair.to_decode.finish(first.attempt)
        await wait_for(lambda: rig.store.figures().stored >= FULL_BLOCKS)
        assert rig.store.figures().pinned == 0

        again = replace(PINNED, attempt=AttemptId("again"))
        await start(rig.pair, again)
        assert (await rig.pair.to_decode.finish(again.attempt)).cached_tokens > 0
        await wait_for(lambda: rig.store.figures().pinned == FULL_BLOCKS)
        rig.flood()
        assert rig.store.lookup(keys_of(PINNED)) == [Tier.CPU] * FULL_BLOCKS


async def test_a_decode_worker_that_computes_the_prompt_pins_it() -> None:
    async with with_store() as rig:
        await rig.pair.to_decode.send(StartDecode(PINNED))
        await rig.pair.to_decode.finish(PINNED.attempt)
        await wait_for(lambda: rig.store.figures().pinned == FULL_BLOCKS)
        assert rig.pair.answer(PINNED.attempt) == expected(PINNED)


async def test_a_request_that_is_cancelled_first_pins_nothing() -> None:
    async with with_store() as rig:
        await rig.pair.to_prefill.send(StartPrefill(PINNED))
        await rig.pair.to_prefill.send(Cancel(PINNED.attempt, "no more"))
        finish = await rig.pair.to_prefill.finish(PINNED.attempt)
        assert finish.reason is FinishReason.CANCELLED
        pins = rig.pair.prefill.sharing._pins
        assert pins is not None
        assert not pins._tasks
        assert rig.store.figures().pinned == 0


@pytest.mark.parametrize("prompt_len", [LAYOUT.block_size - 1, 3 * LAYOUT.block_size])
def test_full_blocks_are_offered_once(prompt_len: int) -> None:
    offered: list[tuple[bytes, int, bytes, float | None]] = []
    pins = PromptPins(LAYOUT, lambda *args: offered.append(args))
    task = replace(make_task("x", prompt_len=prompt_len), cache_pin_s=5.0)
    other = make_task("y", prompt_len=40)  # asks for no pin
    for one in (task, other):
        pins.begin(one)
    outputs = tuple(
        AttemptOutput(one.attempt, (SampledToken(1, index),))
        for one in (task, other)
        for index in range(2)
    )
    pins.on_outputs(outputs)
    pins.on_outputs(outputs)
    keys = b"".join(keys_of(task))
    assert offered == ([(keys, 0, b"", 5.0)] if keys else [])
