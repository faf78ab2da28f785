"""The bound on work in progress, kept before any work is spent on a request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from baton.errors import InvalidRequest, NoWorker, Overloaded
from conductor.request import Request

RETRY_AFTER_S = 1.0


class Admission:
    """Counts answers being worked on; `max_answers` is the bound."""

    def __init__(self, max_answers: int) -> None:
        self._max_answers = max_answers
        self._answers = 0
        self._ids: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Refuse new requests from now on."""
        self._closed = True

    async def wait_idle(self) -> None:
        """Return when nothing is being worked on; give it a deadline."""
        await self._idle.wait()

    def check_open(self) -> None:
        """Cheap check before a prompt is tokenized. Raises NoWorker or Overloaded."""
        if self._closed:
            raise NoWorker("this conductor is shutting down: send the request to another one")
        if self._answers >= self._max_answers:
            raise self._overloaded()

    @contextmanager
    def admit(self, request: Request) -> Iterator[None]:
        """Hold a place for the request. Raises Overloaded, NoWorker, or InvalidRequest when its id
        is in use. A request with more answers than the bound is let in when nothing else runs."""
        self.check_open()
        answers = len(request.answers)
        if self._answers and self._answers + answers > self._max_answers:
            raise self._overloaded()
        if request.id in self._ids:
            raise InvalidRequest(
                f"request_id {request.id!r} is in use by a running request", param="request_id"
            )
        self._ids.add(request.id)
        self._answers += answers
        self._idle.clear()
        try:
            yield
        finally:
            self._ids.discard(request.id)
            self._answers -= answers
            if not self._answers:
                self._idle.set()

    def _overloaded(self) -> Overloaded:
        return Overloaded(
            f"{self._answers} answers are being worked on, the bound is {self._max_answers}: "
            "try again in a moment",
            retry_after_s=RETRY_AFTER_S,
        )
