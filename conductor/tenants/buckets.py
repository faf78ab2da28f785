"""A token bucket in which what was taken comes back one window later, and not before.

So no more than `capacity` is taken in any window, wherever it begins. A bucket that is refilled
steadily lets twice that through in a minute that begins with a full one, unless it is so small that
hardly a request fits. Here a reservation may be as large as all that a window allows, and
what it did not use comes back at once.

Time is divided into slots, so that nothing is remembered of single requests:

    slot   ... 100  101  102 ... 340 | 341 = now       240 slots make a window
    taken        0    7    0       3 |   5             7 come back when slot 342 begins

The slot that something was taken in counts whole: it comes back up to a 240th of a window late.
"""

from __future__ import annotations

SLOTS = 240  # in a window


class Bucket:
    """Times are whole milliseconds of one clock that does not go back."""

    def __init__(self, capacity: int, window_ms: int) -> None:
        self.capacity = capacity
        self._window_ms = window_ms
        self._taken: dict[int, int] = {}  # by slot, the oldest first
        self._used = 0

    def slot(self, now_ms: int) -> int:
        return now_ms * SLOTS // self._window_ms

    def used(self, now_ms: int) -> int:
        """What was taken in the last window and has not come back."""
        first = self.slot(now_ms) - SLOTS
        while self._taken and (slot := next(iter(self._taken))) < first:
            self._used -= self._taken.pop(slot)
        return self._used

    def wait_ms(self, amount: int, now_ms: int) -> int | None:
        """Time until `amount` is free: 0 when it is, None when it never is."""
        missing = self.used(now_ms) + amount - self.capacity
        if missing <= 0:
            return 0
        if amount > self.capacity:
            return None
        for slot, taken in self._taken.items():
            missing -= taken
            if missing <= 0:
                return self._back_at_ms(slot) - now_ms
        return None

    def full_ms(self, now_ms: int) -> int:
        """Time until everything has come back."""
        if not self.used(now_ms):
            return 0
        return self._back_at_ms(next(reversed(self._taken))) - now_ms

    def take(self, amount: int, now_ms: int) -> None:
        """Whether it is free or not: ask `wait_ms` first."""
        self._add(self.slot(now_ms), amount)

    def settle(self, reserved: int, spent: int, slot: int, now_ms: int) -> None:
        """Give back what was reserved in `slot` and not spent; take what was spent beyond that."""
        self.used(now_ms)
        if spent > reserved:
            self.take(spent - reserved, now_ms)
        elif slot in self._taken:
            self._add(slot, spent - reserved)

    def _add(self, slot: int, amount: int) -> None:
        total = self._taken.get(slot, 0) + amount
        if total:
            self._taken[slot] = total
        else:
            self._taken.pop(slot, None)
        self._used += amount

    def _back_at_ms(self, slot: int) -> int:
        """When the slot is no longer in the window: the first whole millisecond of the slot that is
        SLOTS + 1 after it."""
        return -(-(slot + SLOTS + 1) * self._window_ms // SLOTS)
