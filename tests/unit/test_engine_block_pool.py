"""The block pool against a model that is as simple as it can be."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from baton.engine.block_pool import BlockPool
from baton.errors import InternalError
from baton.types.fleet import BlockState


class PoolMachine(RuleBasedStateMachine):
    """Model: a set of holds (each a list of blocks), keys, and the order of retirement."""

    @initialize(size=st.integers(1, 12))
    def make(self, size: int) -> None:
        self.pool = BlockPool(size)
        self.size = size
        self.held: list[tuple[int, ...]] = []
        self.leased: list[tuple[int, ...]] = []
        self.quarantined: list[tuple[int, ...]] = []
        self.keys: dict[int, bytes] = {}
        self.cached: list[int] = []  # least recently used first
        self.next_key = 0

    def holders(self) -> Counter[int]:
        return Counter(block for blocks in self.held + self.leased for block in blocks)

    def retire(self, blocks: tuple[int, ...]) -> None:
        left = self.holders()
        for block in reversed(blocks):
            if not left[block] and block in self.keys:
                self.cached.append(block)

    def pick(self, data: st.DataObject, holds: list[tuple[int, ...]]) -> tuple[int, ...]:
        return holds.pop(data.draw(st.integers(0, len(holds) - 1)))

    @rule(count=st.integers(0, 5))
    def allocate(self, count: int) -> None:
        out_of_use = set(self.holders()) | {b for q in self.quarantined for b in q}
        free = self.size - len(out_of_use) - len(self.cached)
        blocks = self.pool.allocate(count)
        if count > free + len(self.cached):
            assert blocks is None
            return
        assert blocks is not None
        assert len(blocks) == len(set(blocks)) == count
        assert not out_of_use & set(blocks)
        evicted = self.cached[: max(0, count - free)]
        assert set(evicted) == set(blocks) & set(self.cached), "evicts the oldest, only when needed"
        for block in evicted:
            self.cached.remove(block)
            assert self.pool.lookup(self.keys.pop(block)) is None
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.pick(data, self.held)
        self.pool.release(blocks)
        self.retire(blocks)

    @precondition(lambda self: self.held or self.leased)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held + self.leased))
        self.pool.share(blocks)
        self.held.append(blocks)

    @precondition(lambda self: self.cached)
    @rule(data=st.data(), lease=st.booleans())
    def take_cached(self, data: st.DataObject, lease: bool) -> None:
        block = data.draw(st.sampled_from(self.cached))
        assert self.pool.lookup(self.keys[block]) == block
        (self.pool.lease if lease else self.pool.share)((block,))
        (self.leased if lease else self.held).append((block,))
        self.cached.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.pool.lease(blocks)
        self.leased.append(blocks)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        blocks = self.pick(data, self.leased)
        self.pool.end_lease(blocks)
        self.retire(blocks)

    @precondition(lambda self: any(self.held))
    @rule(data=st.data(), again=st.booleans())
    def register(self, data: st.DataObject, again: bool) -> None:
        block = data.draw(st.sampled_from([b for blocks in self.held for b in blocks]))
        if again and self.keys:
            key = data.draw(st.sampled_from(sorted(self.keys.values())))
            if block not in self.keys:
                assert not self.pool.register(block, key)
            elif self.keys[block] == key:
                assert self.pool.register(block, key)
        elif block not in self.keys:
            self.next_key += 1
            key = self.next_key.to_bytes(16, "little")
            assert self.pool.register(block, key)
            self.keys[block] = key

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def quarantine(self, data: st.DataObject) -> None:
        holders = self.holders()
        fit = [
            blocks
            for blocks in self.held
            if all(holders[b] == 1 and b not in self.keys for b in blocks)
        ]
        if fit:
            blocks = data.draw(st.sampled_from(fit))
            self.pool.quarantine(blocks)
            self.held.remove(blocks)
            self.quarantined.append(blocks)

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def end_quarantine(self, data: st.DataObject) -> None:
        self.pool.end_quarantine(self.pick(data, self.quarantined))

    @invariant()
    def agrees_with_the_model(self) -> None:
        references = Counter(b for blocks in self.held for b in blocks)
        leases = Counter(b for blocks in self.leased for b in blocks)
        self.pool.check_integrity(references, leases)
        counts = dict(self.pool.counts())
        assert sum(counts.values()) == self.size
        assert counts[BlockState.LEASED] == len(leases)
        assert counts[BlockState.ACTIVE] == len(references.keys() - leases.keys())
        assert counts[BlockState.CACHED] == len(self.cached)
        assert counts[BlockState.QUARANTINED] == sum(map(len, self.quarantined))
        assert self.pool.available == counts[BlockState.FREE] + counts[BlockState.CACHED]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_deepest_block_of_a_chain_is_evicted_first() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert blocks is not None
    for index, block in enumerate(blocks):
        pool.register(block, bytes([index]) * 16)
    pool.release(blocks)
    assert pool.allocate(2) is not None
    assert [pool.lookup(bytes([i]) * 16) for i in range(3)] == [blocks[0], blocks[1], None]


def test_misuse_is_a_bug_that_is_named() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or ()
    pool.register(block, b"k" * 16)
    for misuse in (
        lambda: pool.quarantine((block,)),
        lambda: pool.register(block, b"x" * 16),
        lambda: pool.end_lease((block,)),
        lambda: pool.end_quarantine((block,)),
        lambda: pool.share((1 - block,)),
        lambda: pool.lease((1 - block,)),
        lambda: pool.release((1 - block,)),
        lambda: pool.register(1 - block, b"y" * 16),
        lambda: pool.check_integrity(references={}),
        lambda: pool.check_integrity(leases={block: 1}),
    ):
        with pytest.raises(InternalError):
            misuse()
    pool.check_integrity({block: 1}, {})


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._free.pop(),
        lambda pool: pool._by_key.clear(),
        lambda pool: pool._quarantined.add(0),
        lambda pool: pool._cached.clear(),
    ],
)
def test_the_check_sees_broken_books(corrupt: object) -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2) or ()
    pool.register(blocks[0], b"k" * 16)
    pool.release(blocks[:1])
    pool.check_integrity()
    assert callable(corrupt)
    corrupt(pool)
    with pytest.raises(InternalError, match="accounting"):
        pool.check_integrity()
