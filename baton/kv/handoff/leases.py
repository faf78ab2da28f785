"""Bookkeeping of the prefill side: leases, their deadlines, and attempts that have ended."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from baton.kv.digest import Cell
from baton.types.handoff import PrefillMessage
from baton.types.request import AttemptId
from baton.types.trace import TraceContext

REMEMBERED = 8192  # endings and request numbers that are kept to answer late messages

PairT = TypeVar("PairT")


class Ending(StrEnum):
    """How an attempt left the publisher. Each attempt that was expected has exactly one."""

    RELEASED = "released"  # the decode worker holds the KV now
    EXPIRED = "expired"  # the lease was not renewed
    ABORTED = "aborted"  # the decode worker gave up, or its stream broke
    REFUSED = "refused"  # not handed over: finished, failed, cancelled, stale or digests differ


@dataclass(slots=True)
class Lease(Generic[PairT]):
    """One attempt between its first mention and its ending."""

    attempt: AttemptId
    expected: bool = False  # this worker works on it (else: only a decode worker spoke of it)
    published: bool = False
    complete: bool = False
    pair: PairT | None = None
    deadline: float | None = None
    backlog: list[PrefillMessage] = field(default_factory=list)  # said before anybody attached
    cells: list[Cell] = field(default_factory=list)
    serving: ExitStack = field(default_factory=ExitStack)
    trace: TraceContext | None = None  # as whoever attached says


class Deadlines:
    """A heap of (deadline, attempt). Entries may be outdated: the lease itself decides."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str, int]] = []

    def push(self, deadline: float, attempt: AttemptId) -> bool:
        """True when this is now the earliest."""
        entry = (deadline, attempt.request_id, attempt.number)
        heapq.heappush(self._heap, entry)
        return self._heap[0] == entry

    def pop_due(self, now: float) -> AttemptId | None:
        if self._heap and self._heap[0][0] <= now:
            _, request_id, number = heapq.heappop(self._heap)
            return AttemptId(request_id, number)
        return None

    def next(self) -> float | None:
        return self._heap[0][0] if self._heap else None


class History:
    """Endings of recent attempts and the newest number of recent requests. Bounded."""

    def __init__(self) -> None:
        self._endings: OrderedDict[AttemptId, tuple[Ending, PrefillMessage | None]] = OrderedDict()
        self._newest: OrderedDict[str, int] = OrderedDict()

    def ending(self, attempt: AttemptId) -> tuple[Ending, PrefillMessage | None] | None:
        """How it ended, and the last message to its decode worker (which may not have come yet)."""
        return self._endings.get(attempt)

    def ended(self, attempt: AttemptId, how: Ending, last: PrefillMessage | None) -> None:
        self._endings[attempt] = (how, last)
        while len(self._endings) > REMEMBERED:
            self._endings.popitem(last=False)

    def note(self, attempt: AttemptId) -> int | None:
        """The newest number of the request that was known before `attempt` was noted."""
        before = self._newest.get(attempt.request_id)
        self._newest[attempt.request_id] = max(attempt.number, before or 0)
        self._newest.move_to_end(attempt.request_id)
        while len(self._newest) > REMEMBERED:
            self._newest.popitem(last=False)
        return before
