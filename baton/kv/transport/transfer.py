"""What the transports share: the state of one read, and the checks before it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from baton.errors import TransportError
from baton.kv.transport.base import Copy


class PendingTransfer:
    """A Transfer whose outcome and idleness are two events.

    read --- settle(error) --> wait() returns or raises
         \\-- end(error) -----> the same, and abort() returns: memory is no longer written

    The transport calls `end` exactly once, on the event loop. `stopped` may be read by its threads.
    """

    def __init__(
        self,
        peer: str,
        on_stop: Callable[[], None] | None = None,
        on_end: Callable[[PendingTransfer], None] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.peer = peer
        self.stopped = False
        self._on_stop = on_stop
        self._on_end = on_end
        self._outcome: asyncio.Future[TransportError | None] = loop.create_future()
        self._idle: asyncio.Future[None] = loop.create_future()

    @property
    def ended(self) -> bool:
        return self._idle.done()

    async def wait(self) -> None:
        error = await asyncio.shield(self._outcome)
        if error is not None:
            raise error

    async def abort(self) -> None:
        self.stop()
        await asyncio.shield(self._idle)

    def stop(self) -> None:
        """Ask the transport to write no further; it calls `end` when that is so."""
        if not self.stopped and not self._idle.done():
            self.stopped = True
            if self._on_stop is not None:
                self._on_stop()

    def settle(self, error: TransportError | None) -> None:
        """Fix the outcome (the first one stays)."""
        if not self._outcome.done():
            self._outcome.set_result(error)

    def end(self, error: TransportError | None) -> None:
        self.settle(error)
        if not self._idle.done():
            self._idle.set_result(None)
            if self._on_end is not None:
                self._on_end(self)


def check_copies(copies: Sequence[Copy], local_bytes: int, remote_bytes: int, peer: str) -> int:
    """Total length of `copies`. Raises TransportError for one that leaves either pool."""
    total = 0
    for copy in copies:
        if copy.length <= 0 or copy.remote < 0 or copy.local < 0:
            raise TransportError(f"a read from {peer} is malformed: {copy}")
        if copy.remote + copy.length > remote_bytes:
            raise TransportError(f"{copy} leaves the pool of {peer} ({remote_bytes} bytes)")
        if copy.local + copy.length > local_bytes:
            raise TransportError(f"{copy} leaves the local pool ({local_bytes} bytes)")
        total += copy.length
    return total


def unknown_peer(peer: str) -> TransportError:
    return TransportError(f"{peer} is not connected; exchange endpoints with it first")


def refused_endpoint(peer: str, transport: str, why: object) -> TransportError:
    return TransportError(
        f"cannot read the memory of {peer} by {transport}: {why}; "
        f"check that both workers run the same baton version with --transport {transport}"
    )
