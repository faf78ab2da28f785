"""The prompts that a worker still has to compute, and how long that is predicted to take.

    start ──> pending, in order ──first token, end or loss──> gone

`PromptQueue` is kept by a link; `Backlog` is what routing sees of it at one moment. A worker
computes prompts in the order of their priority (lower first), and within that by when they are due:
when they came, and their slack later. Of one that is overtaken, it computes the rest later.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from baton.types.request import AttemptId

_OVERDUE_SHARE = 0.25  # of its time, that a prompt which should be done is thought to need still
_AGAIN_SHARE = 0.05  # of its time, after which that is said anew
_AGAIN_S = 0.01  # and no sooner


Turn = tuple[int, float]
"""(priority, due): who has the lower one is computed first."""


class Ahead(NamedTuple):
    """A prompt that is still to be computed, and how long that takes."""

    turn: Turn
    seconds: float


@dataclass(frozen=True, slots=True)
class Backlog:
    """`free_at` is the loop time by which all prompts should be done; 0 when there are none.

    `prompts` are in the order in which they are computed. From `good_until` on, the first one is
    overdue, and the backlog is to be asked for again.
    """

    tokens: int = 0
    free_at: float = 0.0
    prompts: tuple[Ahead, ...] = ()
    good_until: float = math.inf

    def ahead_s(self, now: float, turn: Turn) -> float:
        """Seconds until a prompt of that turn, which arrives now, would begin."""
        left = self.free_at - now
        for prompt in reversed(self.prompts):
            if prompt.turn <= turn:
                break
            left -= prompt.seconds
        return max(left, 0.0)

    def overtaken_s(self, turn: Turn) -> float:
        """What is left of the prompt that is being computed, if one of that turn overtakes it."""
        if not self.prompts or self.prompts[0].turn <= turn:
            return 0.0
        return self.prompts[0].seconds

    def behind(self, turn: Turn) -> int:
        """Prompts that one of that turn would hold up."""
        return sum(prompt.turn > turn for prompt in self.prompts)


EMPTY = Backlog()


@dataclass(slots=True)
class _Prompt:
    turn: Turn
    number: int  # of equal turns, as they came
    attempt: AttemptId
    tokens: int
    seconds: float  # that it should take still, if it was begun and overtaken
    least_s: float  # and is thought to, whatever it took
    begun: bool = False


class PromptQueue:
    def __init__(self) -> None:
        self._pending: dict[AttemptId, _Prompt] = {}
        self._line: list[_Prompt] = []  # sorted; the first is being computed
        self._numbers = count()
        self._seconds = 0.0
        self._since = 0.0  # when the first one was begun, or went on
        self.tokens = 0

    def add(self, attempt: AttemptId, tokens: int, seconds: float, turn: Turn, now: float) -> None:
        """`tokens` of a prompt must be computed, which should take `seconds`."""
        least_s = _OVERDUE_SHARE * seconds
        prompt = _Prompt(turn, next(self._numbers), attempt, tokens, seconds, least_s)
        before = self._first
        insort(self._line, prompt, key=_order)
        self._pending[attempt] = prompt
        self._seconds += seconds
        self.tokens += tokens
        if self._line[0] is prompt:
            if before is not None:  # it goes on when this one is done
                self._set_left(before, self._left_s(before, now))
            self._begin_first(now)

    def done(self, attempt: AttemptId, now: float) -> bool:
        """The prompt is computed, or will not be. False when it was done before."""
        prompt = self._pending.pop(attempt, None)
        if prompt is None:
            return False
        was_first = self._line[0] is prompt
        del self._line[bisect_left(self._line, _order(prompt), key=_order)]
        self._seconds -= prompt.seconds
        self.tokens -= prompt.tokens
        if not self._pending:
            self.clear()  # nor do roundings add up
        elif was_first:
            self._begin_first(now)
        return True

    def has_begun(self, attempt: AttemptId) -> bool:
        """Whether the prompt has been the first in line, or is computed: others may wait."""
        prompt = self._pending.get(attempt)
        return prompt is None or prompt.begun

    def clear(self) -> None:
        self._pending.clear()
        self._line.clear()
        self._seconds = 0.0
        self.tokens = 0

    def snapshot(self, now: float) -> Backlog:
        first = self._first
        if first is None:
            return EMPTY
        left = self._left_s(first, now)
        again_s = left - first.least_s if left > first.least_s else _AGAIN_SHARE * first.seconds
        free_at = now + left + max(self._seconds - first.seconds, 0.0)
        prompts = (Ahead(first.turn, left), *(Ahead(p.turn, p.seconds) for p in self._line[1:]))
        return Backlog(self.tokens, free_at, prompts, now + max(again_s, _AGAIN_S))

    @property
    def _first(self) -> _Prompt | None:
        return self._line[0] if self._line else None

    def _begin_first(self, now: float) -> None:
        self._line[0].begun = True
        self._since = now

    def _left_s(self, first: _Prompt, now: float) -> float:
        return max(first.seconds - (now - self._since), first.least_s)

    def _set_left(self, prompt: _Prompt, seconds: float) -> None:
        self._seconds += seconds - prompt.seconds
        prompt.seconds = seconds


def _order(prompt: _Prompt) -> tuple[Turn, int]:
    return prompt.turn, prompt.number
