"""What others may know and have of a pool: its keys, and blocks that they read under a lease."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from baton.engine.block_pool import BlockPool


class Loans:
    """Each block of a loan has a lease in the pool until it is given back; `on_return` is called
    then, because blocks may have become free."""

    def __init__(self, pool: BlockPool, on_return: Callable[[], None] = lambda: None) -> None:
        self._pool = pool
        self._on_return = on_return
        self._lent: Counter[int] = Counter()

    def keys(self) -> bytes:
        """Of all blocks that can be found here, 16 bytes each."""
        return self._pool.keys()

    def take_changes(self) -> tuple[bytes, bytes]:
        """Keys that came and keys that went since the last call."""
        return self._pool.take_changes()

    def lend(self, keys: Iterable[bytes]) -> tuple[int, ...]:
        """Blocks of the leading run of `keys` that is here; they stay until `end`."""
        blocks = []
        for key in keys:
            block = self._pool.lookup(key)
            if block is None:
                break
            blocks.append(block)
        self._pool.lease(blocks)
        self._lent.update(blocks)
        return tuple(blocks)

    def end(self, blocks: tuple[int, ...]) -> None:
        """Nobody reads these blocks of a loan any more. A loan may end in parts."""
        self._pool.end_lease(blocks)
        self._lent.subtract(blocks)
        for block in blocks:
            if not self._lent[block]:
                del self._lent[block]
        self._on_return()

    @property
    def leases(self) -> Mapping[int, int]:
        """Per block, for `BlockPool.check_integrity`."""
        return self._lent
