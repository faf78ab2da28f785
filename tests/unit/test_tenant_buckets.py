"""The arithmetic of a bucket: never more than its capacity in any window, and nothing is lost."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from conductor.tenants.buckets import SLOTS, Bucket

MINUTE_MS = 60_000


def test_what_is_taken_comes_back_a_window_later_and_not_before() -> None:
    bucket = Bucket(100, MINUTE_MS)
    bucket.take(70, 1_000)
    bucket.take(30, 31_000)
    assert bucket.used(31_000) == 100
    wait_ms = bucket.wait_ms(1, 31_000)
    assert wait_ms == 61_250 - 31_000  # the slot of 250 ms that it was taken in, and a window
    assert bucket.used(31_000 + wait_ms - 1) == 100
    assert bucket.used(31_000 + wait_ms) == 30
    assert bucket.full_ms(61_250) == 91_250 - 61_250
    assert bucket.used(91_250) == 0
    assert bucket.full_ms(91_250) == 0


def test_it_waits_for_as_much_as_is_wanted() -> None:
    bucket = Bucket(100, MINUTE_MS)
    for second in range(10):
        bucket.take(10, second * 1_000)
    now = 20_000
    assert bucket.wait_ms(10, now) == 60_250 - now
    assert bucket.wait_ms(25, now) == 62_250 - now
    assert bucket.wait_ms(100, now) == 69_250 - now
    assert bucket.wait_ms(101, now) is None


def test_settling_gives_back_what_was_not_spent_and_takes_what_was_more() -> None:
    bucket = Bucket(100, MINUTE_MS)
    bucket.take(80, 0)
    bucket.settle(80, 20, bucket.slot(0), 5_000)
    assert bucket.used(5_000) == 20
    bucket.settle(0, 90, bucket.slot(0), 10_000)  # more than it holds
    assert bucket.used(10_000) == 110
    assert bucket.wait_ms(10, 10_000) == 60_250 - 10_000
    assert bucket.wait_ms(11, 10_000) == 70_250 - 10_000
    assert bucket.used(60_250) == 90


def test_what_has_come_back_is_not_given_back_again() -> None:
    bucket = Bucket(100, MINUTE_MS)
    bucket.take(80, 0)
    slot = bucket.slot(0)
    bucket.take(50, 61_000)
    bucket.settle(80, 0, slot, 61_000)
    assert bucket.used(61_000) == 50


def test_it_remembers_no_more_than_a_window() -> None:
    bucket = Bucket(10**9, 7_000)
    for now in range(0, 100_000, 3):
        bucket.take(1, now)
        bucket.used(now)
    assert len(bucket._taken) <= SLOTS + 1


class Bookkeeping(RuleBasedStateMachine):
    """Against the plain meaning: a list of everything that was taken, with its time."""

    def __init__(self) -> None:
        super().__init__()
        self.window_ms = 60_000
        self.bucket = Bucket(1000, self.window_ms)
        self.now = 12_345
        self.taken: list[list[int]] = []  # time, amount; reservations as they stand
        self.open: list[tuple[int, int]] = []  # index in `taken`, slot

    @rule(pause=st.integers(0, 20_000))
    def wait(self, pause: int) -> None:
        self.now += pause

    @rule(amount=st.integers(1, 600))
    def reserve(self, amount: int) -> None:
        wait_ms = self.bucket.wait_ms(amount, self.now)
        assert wait_ms is not None
        if wait_ms == 0:
            self.bucket.take(amount, self.now)
            self.open.append((len(self.taken), self.bucket.slot(self.now)))
            self.taken.append([self.now, amount])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        index, slot = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        reserved = self.taken[index][1]
        spent = data.draw(st.integers(0, reserved))
        self.bucket.settle(reserved, spent, slot, self.now)
        self.taken[index][1] = spent

    @rule(amount=st.integers(1, 600))
    def wait_as_told(self, amount: int) -> None:
        wait_ms = self.bucket.wait_ms(amount, self.now)
        assert wait_ms is not None
        if wait_ms:
            assert self.bucket.wait_ms(amount, self.now + wait_ms - 1)
            self.now += wait_ms
        assert self.bucket.wait_ms(amount, self.now) == 0

    @invariant()
    def never_more_than_the_capacity_in_any_window(self) -> None:
        since = [sum(a for t, a in self.taken if begin <= t < begin + self.window_ms)
                 for begin, _ in self.taken]  # fmt: skip
        assert max(since, default=0) <= 1000

    @invariant()
    def used_is_what_the_last_window_took(self) -> None:
        slot_ms = -(-self.window_ms // SLOTS)
        used = self.bucket.used(self.now)
        ago = self.now - self.window_ms
        assert used >= sum(amount for at, amount in self.taken if at > ago)
        assert used <= sum(amount for at, amount in self.taken if at > ago - slot_ms)


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
