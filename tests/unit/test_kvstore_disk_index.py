"""The index of blocks on disk, against a dictionary."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.disk_index import DiskIndex
from tests.unit.kvstore_kit import key_of

LOCATIONS = 12
keys = st.integers(0, 30).map(key_of)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = DiskIndex(LOCATIONS)
        self.model: dict[bytes, int] = {}

    @rule(key=keys, location=st.integers(0, LOCATIONS - 1))
    def put(self, key: bytes, location: int) -> None:
        if location not in self.model.values():
            self.index.put(key, location)
            self.model[key] = location

    @rule(key=keys)
    def remove(self, key: bytes) -> None:
        assert self.index.remove(key) == self.model.pop(key, None)

    @rule(key=keys)
    def find(self, key: bytes) -> None:
        assert self.index.find(key) == self.model.get(key)

    @rule(begin=st.integers(0, LOCATIONS), end=st.integers(0, LOCATIONS))
    def within(self, begin: int, end: int) -> None:
        expected = sorted((at, key) for key, at in self.model.items() if begin <= at < end)
        assert self.index.within(begin, end) == expected

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len(self.model)
        assert set(self.index) == set(self.model)


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestIndex = IndexMachine.TestCase


def test_a_full_index_takes_less_than_thirty_bytes_a_block() -> None:
    for locations in (1000, 5000, 100_000):
        index = DiskIndex(locations)
        for n in range(locations):
            index.put(key_of(n), n)
        assert index.nbytes / locations < 30
