"""Prompts that workers have been given and not finished: what they will soon hold.

The prefix map knows blocks that are computed. A burst of prompts with the same beginning would find
nobody who has it, and each worker would compute it again; whoever computes it now is worth waiting
for as far as the estimate says so.

    start ──> expected at its worker ──finish, cancel or loss──> gone (the prefix map knows by then)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

from baton.hashing import KEY_BYTES
from baton.types.request import AttemptId

MOST_LOOKED_AT = 64  # of the prompts that begin alike, the latest


class _Prompt(NamedTuple):
    worker: str
    keys: bytes
    priority: int


class ExpectedBlocks:
    """As many prompts as there are attempts under way, by their prefix group.

    Of each, it knows what was hashed: of a prompt that nobody has, the first stretch
    (`prompt_keys.py`).
    """

    def __init__(self) -> None:
        self._groups: dict[bytes, dict[AttemptId, _Prompt]] = {}
        self._group_of: dict[AttemptId, bytes] = {}

    def __len__(self) -> int:
        return len(self._group_of)

    def add(
        self, attempt: AttemptId, group: bytes, keys: bytes, worker: str, priority: int
    ) -> None:
        """`worker` computes a prompt with these block keys; nothing for prompts without a group."""
        if group:
            self._groups.setdefault(group, {})[attempt] = _Prompt(worker, keys, priority)
            self._group_of[attempt] = group

    def done(self, attempt: AttemptId) -> None:
        """The worker has finished it, or will not; may be said again."""
        group = self._group_of.pop(attempt, None)
        if group is not None:
            prompts = self._groups[group]
            del prompts[attempt]
            if not prompts:
                del self._groups[group]

    def blocks(self, group: bytes, keys: bytes, priority: int) -> Mapping[str, int]:
        """How many leading blocks of a prompt each worker is expected to have when it begins it.

        Prompts of less urgency do not count, because this one would overtake them.
        """
        found: dict[str, int] = {}
        for prompt in islice(reversed(self._groups.get(group, {}).values()), MOST_LOOKED_AT):
            if prompt.priority <= priority:
                known = found.get(prompt.worker, 0)
                found[prompt.worker] = _common(keys, prompt.keys, known)
        return found


def _common(keys: bytes, other: bytes, known: int) -> int:
    """Leading keys that are the same, at least `known`. Keys are chained: two that are equal at one
    place are equal before it, too."""

    def alike(first: int, end: int) -> bool:
        at = slice(first * KEY_BYTES, end * KEY_BYTES)
        return keys[at] == other[at]

    low, high = known, min(len(keys), len(other)) // KEY_BYTES
    if low >= high or not alike(low, low + 1):
        return low  # no more than another prompt there
    if alike(low, high):
        return high  # the next turn of a conversation, or the same prompt again
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if alike(middle - 1, middle) else (low, middle)
    return low
