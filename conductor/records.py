"""Says in the registry where requests run, so that another conductor can take them over.

Serving never waits for it: records are noted here, and one task brings them to the registry. What
that could not take is brought again when it can, and everything when it has lost what it had. A
request without a record is made again from its start.
"""

from __future__ import annotations

import asyncio
import contextlib

from baton.errors import RegistryUnavailable
from baton.rpc.registry import Registry
from baton.types.registry import AnswerPlace, RequestRecord

LINGER_S = 15.0  # how long a record stays when its request has ended: the client may not know
RETRY_S = 1.0  # between tries while the registry is away
FEW = 1024  # records that are kept without looking for old ones


class Records:
    """Of one conductor. Without a registry there is nobody to tell."""

    def __init__(self, registry: Registry | None, conductor: str) -> None:
        self._registry = registry
        self._conductor = conductor
        self._noted: dict[str, tuple[RequestRecord, float]] = {}  # by key; until when
        self._untold: dict[str, None] = {}  # keys, the oldest first
        self._sweep_at = FEW
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """Records that are kept, some of them run out."""
        return len(self._noted)

    @property
    def shared(self) -> bool:
        """Whether other conductors can find the records."""
        return self._registry is not None

    def note(self, key: str, answers: tuple[AnswerPlace, ...], ttl_s: float) -> None:
        """The request's answers are made there now."""
        if self._registry is None or not answers:
            return
        self._noted[key] = (RequestRecord(self._conductor, answers), _now() + ttl_s)
        self._untold[key] = None
        if len(self._noted) > self._sweep_at:
            self._sweep()
        self._wake.set()

    def tell_again(self) -> None:
        """The registry has lost what it was told."""
        self._sweep()
        self._untold.update(dict.fromkeys(self._noted))
        self._wake.set()

    async def find(self, key: str) -> RequestRecord | None:
        """Also what was noted here, when the registry does not know it or cannot be asked."""
        found: RequestRecord | None = None
        if self._registry is not None:
            with contextlib.suppress(RegistryUnavailable):  # it logs that it is away
                found = await self._registry.find_request(key)
        own, until = self._noted.get(key, (None, 0.0))
        return found or (own if until > _now() else None)

    async def run(self) -> None:
        """Tell the registry what is noted, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._registry is not None and self._untold:
                key = next(iter(self._untold))
                del self._untold[key]  # first: it may be noted again meanwhile
                try:
                    await self._tell(self._registry, key)
                except RegistryUnavailable:
                    self._untold.setdefault(key)
                    await asyncio.sleep(RETRY_S)

    async def _tell(self, registry: Registry, key: str) -> None:
        record, until = self._noted.get(key, (None, 0.0))
        left_s = until - _now()
        if record is not None and left_s > 0:
            await registry.note_request(key, record, left_s)

    def _sweep(self) -> None:
        """Forget what has run out. Rarely enough to cost nothing."""
        now = _now()
        self._noted = {key: noted for key, noted in self._noted.items() if noted[1] > now}
        self._sweep_at = max(FEW, 2 * len(self._noted))


def _now() -> float:
    return asyncio.get_running_loop().time()
