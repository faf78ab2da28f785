"""What a request hears while it is served: from its workers, its timers and its operator.

Everything arrives in one inbox, so the request's coroutine has a single place where it waits.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

from baton.errors import BatonError
from baton.types.fleet import Role
from baton.types.request import AttemptId, AttemptOutput
from conductor.answer_run import Phase
from conductor.link import Stage


class Output(NamedTuple):
    """One for every token: cheaper to make than a frozen dataclass."""

    duty: Role
    worker: str
    output: AttemptOutput


@dataclass(frozen=True, slots=True)
class Lost:
    duty: Role
    worker: str
    attempt: AttemptId
    stage: Stage
    reason: str


@dataclass(frozen=True, slots=True)
class Again:
    """It is time for another attempt after this one."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Late:
    """An attempt has been in a phase for as long as it may."""

    attempt: AttemptId
    phase: Phase


@dataclass(frozen=True, slots=True)
class Abort:
    """The whole request ends with this error."""

    error: BatonError


Event = Output | Lost | Again | Late | Abort


class Inbox:
    """Events for one request; `take` returns all that have arrived."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._events)

    def clear(self) -> None:
        self._events.clear()

    def put(self, event: Event) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Event]:
        while not self._events:
            self._waiter = self._loop.create_future()
            await self._waiter
        events, self._events = self._events, []
        return events
