"""Says in the registry where requests run, so that another conductor can take them over.

Serving never waits for it: records are noted here, and one task brings them to the registry. While
that is away, they are dropped; a request without a record is made again from its start.
"""

from __future__ import annotations

import asyncio
import contextlib

from baton.errors import RegistryUnavailable
from baton.rpc.registry import Registry
from baton.types.registry import AnswerPlace, RequestRecord

LINGER_S = 15.0  # how long a record stays when its request has ended: the client may not know
MAX_UNTOLD = 4096  # records that wait; more, and the oldest are dropped


class Records:
    """Of one conductor. Without a registry there is nobody to tell."""

    def __init__(self, registry: Registry | None, conductor: str) -> None:
        self._registry = registry
        self._conductor = conductor
        self._untold: dict[str, tuple[RequestRecord, float]] = {}
        self._wake = asyncio.Event()

    @property
    def shared(self) -> bool:
        """Whether other conductors can find the records."""
        return self._registry is not None

    def note(self, key: str, answers: tuple[AnswerPlace, ...], ttl_s: float) -> None:
        """The request's answers are made there now."""
        if self._registry is None or not answers:
            return
        self._untold.pop(key, None)
        self._untold[key] = (RequestRecord(self._conductor, answers), ttl_s)
        if len(self._untold) > MAX_UNTOLD:
            del self._untold[next(iter(self._untold))]
        self._wake.set()

    async def find(self, key: str) -> RequestRecord | None:
        """None also when the registry cannot be asked."""
        if self._registry is None:
            return None
        with contextlib.suppress(RegistryUnavailable):  # it logs that it is away
            return await self._registry.find_request(key)
        return None

    async def run(self) -> None:
        """Tell the registry what is noted, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._registry is not None and self._untold:
                key = next(iter(self._untold))
                record, ttl_s = self._untold.pop(key)
                with contextlib.suppress(RegistryUnavailable):
                    await self._registry.note_request(key, record, ttl_s)
