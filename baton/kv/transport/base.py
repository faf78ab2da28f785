"""The transport seam: one-sided reads of a peer's registered pool.

    reader (decode worker)                      source (prefill worker)
    allocate pool                               allocate pool
    endpoint() --- Hello on handoff stream ---> connect(reader's endpoint)
    connect(source's endpoint) <--- Hello ----- endpoint()
    read(source, copies) ....................... serving() while anything is published

A transport owns the pool memory that it allocates, because some (shm) can only serve memory that
they made. Nothing here starts in a constructor; `close` ends everything that `start` began.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """Memory of one block pool. Valid until the transport that made it is closed."""

    address: int
    nbytes: int
    device: str  # "cpu" | "cuda:N"
    buffer: object  # what the runner builds its tensor on: a writable buffer (cpu) or torch tensor


@dataclass(frozen=True, slots=True)
class Copy:
    """`length` bytes from `remote` in the peer's pool to `local` in ours (byte offsets)."""

    remote: int
    local: int
    length: int


class Transfer(Protocol):
    """A read under way. Exactly one of wait / abort must be awaited to its end."""

    async def wait(self) -> None:
        """Return when every byte is in local memory. Raises TransportError. Cancelling `wait` does
        not stop the transfer: call `abort`."""

    async def abort(self) -> None:
        """Return once local memory can no longer be written by this transfer (the quarantine's
        end). Never raises for a transfer that failed or had finished."""


class Transport(Protocol):
    name: str

    async def start(self) -> None: ...

    def allocate(self, nbytes: int, device: str = "cpu", backing: Path | None = None) -> PoolMemory:
        """Make and register the pool, zeroed. Once per transport, after `start`.

        With `backing`, a CPU pool in that file (of shared memory, for one process at a time), which
        is made or resized, and whose contents are those that an earlier pool of the same transport
        and size left there. Raises ConfigError when the file cannot be had or is in use, and for
        transports that cannot do that."""

    def endpoint(self) -> bytes:
        """Opaque description of this side for a peer's `connect`. Only sent to peers that hold the
        cluster token (NIXL's contains pickled data)."""

    async def connect(self, peer: str, endpoint: bytes) -> None:
        """Get ready to exchange with `peer` (name and incarnation, unique). Replaces an older
        connection of that name. Raises TransportError with a deadline of its own."""

    async def disconnect(self, peer: str) -> None:
        """Forget the peer. Transfers from it fail. Unknown peers are ignored."""

    def read(self, peer: str, copies: Sequence[Copy]) -> Transfer:
        """Begin to read. Raises TransportError at once for an unknown peer or a range that is
        outside of either pool."""

    def serving(self, peer: str) -> AbstractContextManager[None]:
        """While entered, this side makes whatever progress `peer`'s reads need (NIXL over TCP).
        Idle transports burn no CPU. Re-entrant."""

    async def close(self) -> None:
        """Abort transfers, disconnect everybody, free the pool. Idempotent."""
