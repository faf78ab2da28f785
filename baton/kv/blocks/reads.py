"""What a borrower reads under one loan: whole blocks, one group of layers after the other."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from baton.kv.blocks.options import BlocksOptions
from baton.kv.blocks.session import Session
from baton.kv.digest import verify_digests
from baton.kv.layout import copies_for
from baton.kv.settle import settle
from baton.kv.transport.base import PoolMemory, Transfer
from baton.types.fleet import KvLayout

log = logging.getLogger(__name__)

AHEAD = 2  # groups under way at a time: the next one moves while the last bytes of one come in


@dataclass(frozen=True, slots=True)
class Lent:
    """Blocks of the lender, where they go, and what they should be (or no digests)."""

    remote: tuple[int, ...]
    local: tuple[int, ...]
    digests: tuple[bytes, ...] = ()


@dataclass(slots=True)
class Reads:
    """Of one loan. Once `read` or a task with it has failed, `settle` before the local blocks are
    used for anything else."""

    session: Session
    memory: PoolMemory
    layout: KvLayout
    options: BlocksOptions
    nbytes: int = 0
    _running: set[Transfer] = field(default_factory=set)

    @property
    def idle(self) -> bool:
        return not self._running

    async def read(
        self,
        lent: Lent,
        layer_groups: int = 1,
        on_layers: Callable[[int], None] = lambda layer_end: None,
    ) -> None:
        """Bring the blocks here and verify them. `on_layers(n)` says that layers [0, n) have come:
        they are not verified, and void unless the loan holds until it is returned.

        Raises TransportError and DigestMismatch.
        """
        waiting: deque[tuple[int, Transfer]] = deque()
        for begin, end in pairwise(layer_edges(self.layout.num_layers, layer_groups)):
            if len(waiting) == AHEAD:
                on_layers(await self._finish(*waiting.popleft()))
            waiting.append((end, self._begin(lent, begin, end)))
        while waiting:
            on_layers(await self._finish(*waiting.popleft()))
        await verify_digests(
            self.memory,
            self.layout,
            lent.local,
            (0, self.layout.num_layers),
            lent.digests,
            self.session.key,
            self.options.inline_digest_bytes,
        )

    async def settle(self) -> None:
        """Give up what still runs; return when local memory is no longer written. At the latest
        `linger_s` seconds later the stream is cut, which ends all reads from the peer."""
        if not self._running:
            return
        if not await settle(self._running, self.options.linger_s, self.session.break_off):
            log.warning("reads from %s hung: the stream was closed", self.session.key)
        self._running.clear()

    def _begin(self, lent: Lent, layer_begin: int, layer_end: int) -> Transfer:
        copies = copies_for(self.layout, lent.remote, lent.local, layer_begin, layer_end)
        transfer = self.session.transport.read(self.session.key, copies)
        self._running.add(transfer)
        self.nbytes += sum(copy.length for copy in copies)
        return transfer

    async def _finish(self, layer_end: int, transfer: Transfer) -> int:
        await transfer.wait()
        self._running.discard(transfer)
        return layer_end


def layer_edges(num_layers: int, groups: int) -> Sequence[int]:
    """Bounds of `groups` runs of layers of nearly equal length, as [0, ..., num_layers]."""
    groups = max(1, min(groups, num_layers))
    return [num_layers * n // groups for n in range(groups + 1)]
