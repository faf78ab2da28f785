"""The prompts that a worker still has to compute, and how long that is predicted to take.

    start ──> pending, in order ──first token, end or loss──> gone

`PromptQueue` is kept by a link; `Backlog` is what routing sees of it at one moment. A worker
computes prompts in the order of their priority (lower first), and within that as they came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from baton.types.request import AttemptId

_OVERDUE_SHARE = 0.25  # of its time, that a prompt which should be done is thought to need still
_AGAIN_SHARE = 0.05  # of its time, after which that is said anew
_AGAIN_S = 0.01  # and no sooner


@dataclass(frozen=True, slots=True)
class Backlog:
    """`free_at` is the loop time by which all prompts should be done; 0 when there are none.

    `levels` has the seconds of work of each priority, most urgent first. From `good_until` on, the
    first prompt is overdue, and the backlog is to be asked for again.
    """

    tokens: int = 0
    free_at: float = 0.0
    levels: tuple[tuple[int, float], ...] = ()
    good_until: float = math.inf

    def ahead_s(self, now: float, priority: int) -> float:
        """Seconds until a prompt of `priority` that arrives now would begin."""
        left = max(self.free_at - now, 0.0)
        if not self.levels or self.levels[-1][0] <= priority:
            return left
        return min(left, sum(seconds for level, seconds in self.levels if level <= priority))


EMPTY = Backlog()


class _Prompt(NamedTuple):
    tokens: int
    seconds: float
    priority: int


class PromptQueue:
    """Not ordered by priority: who is computed first only matters for how the time passes."""

    def __init__(self) -> None:
        self._pending: dict[AttemptId, _Prompt] = {}
        self._levels: dict[int, float] = {}
        self._seconds = 0.0
        self._since = 0.0  # when the first one began to be computed
        self.tokens = 0

    def add(
        self, attempt: AttemptId, tokens: int, seconds: float, priority: int, now: float
    ) -> None:
        """`tokens` of a prompt must be computed, which should take `seconds`."""
        if not self._pending:
            self._since = now
        self._pending[attempt] = _Prompt(tokens, seconds, priority)
        self._levels[priority] = self._levels.get(priority, 0.0) + seconds
        self._seconds += seconds
        self.tokens += tokens

    def done(self, attempt: AttemptId, now: float) -> bool:
        """The prompt is computed, or will not be. False when it was done before."""
        if attempt not in self._pending:
            return False
        if attempt == next(iter(self._pending)):
            self._since = now
        prompt = self._pending.pop(attempt)
        self._levels[prompt.priority] -= prompt.seconds
        self._seconds -= prompt.seconds
        self.tokens -= prompt.tokens
        if not self._pending:
            self.clear()  # nor do roundings add up
        return True

    def has_begun(self, attempt: AttemptId) -> bool:
        """Whether the prompt is the first in line, or computed: those behind it may wait."""
        return attempt not in self._pending or attempt == next(iter(self._pending))

    def clear(self) -> None:
        self._pending.clear()
        self._levels.clear()
        self._seconds = 0.0
        self.tokens = 0

    def snapshot(self, now: float) -> Backlog:
        if not self._pending:
            return EMPTY
        first = next(iter(self._pending.values()))
        left, least = first.seconds - (now - self._since), _OVERDUE_SHARE * first.seconds
        again_s = left - least if left > least else _AGAIN_SHARE * first.seconds
        left = max(left, least)
        free_at = now + left + max(self._seconds - first.seconds, 0.0)
        levels = tuple((level, max(s, 0.0)) for level, s in sorted(self._levels.items()))
        return Backlog(self.tokens, free_at, levels, now + max(again_s, _AGAIN_S))
