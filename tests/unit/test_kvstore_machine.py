"""A store against a model: whatever happens, in whatever order, it never gives wrong bytes, never
loses what it may not lose, and its accounts agree."""

from __future__ import annotations

import asyncio
import errno
import shutil
import tempfile
from collections import Counter
from contextlib import aclosing
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.types.kv_events import Tier
from kvstore.eviction import POLICIES
from kvstore.loads import LoadOptions
from kvstore.memory_tier import SlotState
from kvstore.sealing import SealOptions
from kvstore.store import StoreOptions
from tests.unit.kvstore_kit import (
    ALWAYS,
    BLOCK,
    Areas,
    FaultyFiles,
    InlineThreads,
    Rig,
    disk_options,
    key_of,
    make_rig,
    payload_of,
)
from tests.virtual_time import VirtualTimeLoop

SLOTS, CHAINS, LENGTH = 8, 4, 6
LOADS = LoadOptions(batches_ahead=2, batch_bytes=2 * BLOCK, timeout_s=3.0)


chains = st.integers(0, CHAINS - 1)
depths = st.integers(0, LENGTH - 1)
delays = st.sampled_from([0.0, 0.5, 5.0])


def block(chain: int, depth: int) -> bytes:
    """Chains are different everywhere but in their first block."""
    return key_of(1000 * chain + depth) if depth else key_of(999)


def keys_of(chain: int) -> list[bytes]:
    return [block(chain, depth) for depth in range(LENGTH)]


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self.directory = Path(tempfile.mkdtemp())
        self.disks = 0
        self.areas = Areas.of(SLOTS)
        self.policy = "lru"
        self.behind = 4  # blocks: then the store takes no more
        self.rig: Rig
        self.fresh()
        self.stored: set[bytes] = set()

    def fresh(self) -> None:
        """What is forgotten when the process is started again."""
        self.files = FaultyFiles()
        self.threads = InlineThreads(0.5)
        self.open_puts: dict[bytes, int] = {}
        self.pins: Counter[bytes] = Counter()
        self.kept: dict[bytes, float] = {}  # what was in memory, and must stay there until then
        self.gets: list[asyncio.Task[None]] = []
        self.known: dict[Tier, set[bytes]] = {Tier.CPU: set(), Tier.NVME: set()}

    @property
    def disk_path(self) -> Path:
        return self.directory / str(self.disks)

    def start(self) -> None:
        self.fresh()
        options = disk_options(self.disk_path, records=3, segments=4)
        sealing = SealOptions(batch_bytes=2 * BLOCK, behind_bytes=self.behind * BLOCK)
        how = StoreOptions(spare_slots=2, demotions=2, loads=LOADS, sealing=sealing)
        self.rig = make_rig(self.areas, options, how, self.files, self.threads, self.policy)
        self.runner.run(self.rig.store.open())

    @initialize(policy=st.sampled_from(sorted(POLICIES)), behind=st.sampled_from([1, 4, 64]))
    def first_start(self, policy: str, behind: int) -> None:
        self.policy = policy
        self.behind = behind
        self.start()

    # Steps

    @rule(chain=chains, depth=depths, count=st.integers(1, LENGTH))
    def begin_puts(self, chain: int, depth: int, count: int) -> None:
        keys = keys_of(chain)[depth : depth + count]

        async def begin() -> list[int | None]:
            return self.rig.store.begin_puts(keys, depth)

        for key, slot in zip(keys, self.runner.run(begin()), strict=True):
            if slot is not None:
                assert key not in self.open_puts
                assert slot not in self.open_puts.values()
                self.open_puts[key] = slot

    @precondition(lambda self: self.open_puts)
    @rule(data=st.data(), commit=st.booleans())
    def end_put(self, data: st.DataObject, commit: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.open_puts)))
        slot = self.open_puts.pop(key)
        view = self.rig.memory.view(slot)
        if commit:
            view[:] = payload_of(key)

            async def end() -> None:
                self.rig.store.commit_put(key)

            self.runner.run(end())
            self.stored.add(key)
            assert self.rig.store.lookup([key]) == [Tier.CPU]
        else:
            view[:100] = b"?" * 100
            self.rig.store.abort_put(key)

    @rule(chain=chains)
    def put_chain(self, chain: int) -> None:
        async def put() -> None:
            self.stored |= set(self.rig.put_many(keys_of(chain)))

        self.runner.run(put())

    @rule(chain=chains, limit=st.integers(1, LENGTH), keep=st.booleans(), wait=st.booleans())
    def get(self, chain: int, limit: int, keep: bool, wait: bool) -> None:
        async def begin() -> None:
            task = asyncio.create_task(self._get(keys_of(chain), limit, keep))
            self.gets.append(task)
            if wait:
                await task

        self.runner.run(begin())

    async def _get(self, keys: list[bytes], limit: int, keep: bool) -> None:
        expected = 0
        async with aclosing(self.rig.store.get(keys)) as blocks:
            async for index, slot in blocks:
                assert index == expected
                expected += 1
                assert keys[index] in self.stored
                assert bytes(self.rig.memory.view(slot)) == payload_of(keys[index])
                self.pins[keys[index]] += 1
                if not keep:
                    try:
                        await asyncio.sleep(0.1)
                        assert bytes(self.rig.memory.view(slot)) == payload_of(keys[index])
                    finally:  # who is cancelled while it looks at a block owes its unpin too
                        self.unpin(keys[index])
                if expected == limit:
                    return

    def unpin(self, key: bytes) -> None:
        self.rig.store.unpin([key])
        self.pins -= Counter([key])

    @precondition(lambda self: self.gets)
    @rule(data=st.data())
    def cancel_get(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.gets))

        async def cancel() -> None:
            task.cancel()
            await asyncio.wait([task])

        self.runner.run(cancel())

    @rule()
    def give_back_all(self) -> None:
        if all(task.done() for task in self.gets):
            for key in list(self.pins.elements()):
                self.unpin(key)

    @rule(chain=chains, seconds=st.sampled_from([0.2, 3.0]))
    def pin_for_a_while(self, chain: int, seconds: float) -> None:
        async def pin() -> None:
            until = asyncio.get_running_loop().time() + seconds
            for key in keys_of(chain):
                if self.rig.store.keep(key, seconds) and key in self.rig.memory:
                    self.kept[key] = max(until, self.kept.get(key, until))

        self.runner.run(pin())

    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @rule(delay=delays)
    def disk_takes(self, delay: float) -> None:
        self.threads.delay = delay

    @rule(
        what=st.sampled_from(["read", "write", "create", "unlink"]),
        code=st.sampled_from([errno.EIO, errno.ENOSPC]),
        times=st.sampled_from([1, 1, 2, ALWAYS]),
    )
    def disk_fails(self, what: str, code: int, times: int) -> None:
        self.files.fail[what] = (code, times)

    @rule()
    def disk_works_again(self) -> None:
        self.files.fail.clear()

    @rule(chain=chains, depth=depths)
    def forget_on_disk(self, chain: int, depth: int) -> None:
        assert self.rig.disk is not None
        self.rig.disk.remove(block(chain, depth))

    @rule()
    def restart(self) -> None:
        self.stop()
        assert self.rig.memory.unsealed == 0
        self.start()

    @rule(wait=st.booleans())
    def killed(self, wait: bool) -> None:
        """The next process finds the files as they were in the middle of everything."""
        memory = self.rig.memory
        areas = self.areas.copy()
        before = {key for key in memory if memory.unsealed_put(key) is None}
        claimed = dict(memory.counts())[SlotState.CLAIMED]
        shutil.copytree(self.disk_path, self.directory / str(self.disks + 1))
        self.stop()
        self.areas = areas
        self.disks += 1
        self.start()
        if not wait:
            return
        self.runner.run(self.rig.store.settle())
        found = set(self.rig.memory)
        assert found >= before
        assert len(found) <= len(before) + claimed  # what was claimed when it was killed, too
        for key in found:
            slot = self.rig.memory.slot_of(key)
            assert slot is not None
            assert bytes(self.rig.memory.view(slot)) == payload_of(key)

    def stop(self) -> None:
        async def stop() -> None:
            for task in self.gets:
                task.cancel()
            await asyncio.gather(*self.gets, return_exceptions=True)
            for key in self.open_puts:
                self.rig.store.abort_put(key)
            await self.rig.store.close()

        self.threads.delay = 0.0
        self.runner.run(stop())

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.stop()
        self.runner.close()
        shutil.rmtree(self.directory)

    # What always holds

    @invariant()
    def accounts_agree(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.store.check_integrity()
        for task in self.gets:
            if task.done() and not task.cancelled():
                task.result()
        self.gets = [task for task in self.gets if not task.done()]
        assert self.rig.disk is not None
        assert set(self.rig.memory) | set(self.rig.disk) <= self.stored
        for key, count in self.pins.items():
            assert self.rig.memory.pins().get(key, 0) >= count

    @invariant()
    def what_is_kept_is_in_memory(self) -> None:
        if not hasattr(self, "rig"):
            return
        now = self.runner.get_loop().time()
        self.kept = {key: until for key, until in self.kept.items() if until > now}
        assert self.kept.keys() <= set(self.rig.memory)
        assert len(self.rig.store._pins) <= SLOTS // 2

    @invariant()
    def what_was_told_is_so(self) -> None:
        if not hasattr(self, "rig"):
            return
        for event in self.rig.store.take_changes():
            tier = self.known[event.tier]
            for at in range(0, len(event.added), 16):
                tier.add(event.added[at : at + 16])
            for at in range(0, len(event.removed), 16):
                tier.remove(event.removed[at : at + 16])
        assert self.rig.disk is not None
        assert self.known == {Tier.CPU: set(self.rig.memory), Tier.NVME: set(self.rig.disk)}

    @invariant()
    def idle_means_no_pins(self) -> None:
        """When nothing is under way, the only pins are those that somebody asked for."""
        if not hasattr(self, "rig") or self.gets:
            return
        store = self.rig.store
        if not store._demoting and not store.loads.tasks and not store._pins:
            assert self.rig.memory.pins() == dict(self.pins)


StoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestStore = StoreMachine.TestCase
