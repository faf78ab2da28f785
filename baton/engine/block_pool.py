"""The only owner of block ids: who holds which block, and which blocks can be reused.

A block's state follows from its holds; when several apply, the first of this list is reported:

    QUARANTINED  nobody holds it, but a transfer may still write to it; has no other holder, no key
    LEASED       published to a handoff (one lease per reader)
    ACTIVE       in the block table of a sequence or reservation (one reference each)
    CACHED       held by nobody, keyed: can be found by its key, and is evicted when needed
    FREE         held by nobody, no key

Every operation is O(1) per block. Not thread-safe: belongs to the event loop.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from baton.errors import InternalError
from baton.types.fleet import BlockState


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._leases = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._free = list(reversed(range(num_blocks)))  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._quarantined: set[int] = set()
        self._leased = 0  # blocks with a lease
        self._active = 0  # blocks with a reference and no lease
        self._changes: dict[bytes, bool] = {}  # since `take_changes`: findable now, or not

    @property
    def available(self) -> int:
        """Blocks that `allocate` could hand out now: FREE and CACHED."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` blocks with one reference each, or None when there are not enough.

        Evicts least recently used CACHED blocks when the FREE ones run out.
        """
        if count > self.available:
            return None
        blocks = tuple(self._free.pop() if self._free else self._evict() for _ in range(count))
        for block in blocks:
            self._references[block] = 1
        self._active += count
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are held by others or CACHED."""
        for block in blocks:
            state = self.state(block)
            if state is BlockState.CACHED:
                del self._cached[block]
                self._active += 1
            elif state not in (BlockState.ACTIVE, BlockState.LEASED):
                raise InternalError(f"Block {block} is {state}: it cannot be shared.")
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each. Give a sequence's blocks in order: the last one is freed
        first and so evicted first, and no cached block outlives the prefix that leads to it."""
        for block in reversed(blocks):
            if self._references[block] == 0:
                raise InternalError(f"Block {block} was released but nobody references it.")
            self._references[block] -= 1
            if self._references[block] == 0 and self._leases[block] == 0:
                self._active -= 1
                self._retire(block)

    def lease(self, blocks: Iterable[int]) -> None:
        """Add a lease to blocks that are held or CACHED."""
        for block in blocks:
            state = self.state(block)
            if state is BlockState.ACTIVE:
                self._active -= 1
            elif state is BlockState.CACHED:
                del self._cached[block]
            elif state is not BlockState.LEASED:
                raise InternalError(f"Block {block} is {state}: it cannot be leased.")
            if self._leases[block] == 0:
                self._leased += 1
            self._leases[block] += 1

    def end_lease(self, blocks: Sequence[int]) -> None:
        """Drop one lease of each, the last block first (see `release`)."""
        for block in reversed(blocks):
            if self._leases[block] == 0:
                raise InternalError(f"A lease of block {block} was ended but it has none.")
            self._leases[block] -= 1
            if self._leases[block] == 0:
                self._leased -= 1
                if self._references[block]:
                    self._active += 1
                else:
                    self._retire(block)

    def quarantine(self, blocks: Iterable[int]) -> None:
        """Drop the only reference of each, but keep it out of use until `end_quarantine`."""
        for block in blocks:
            if self._references[block] != 1 or self._leases[block] or self._keys[block]:
                raise InternalError(
                    f"Block {block} is shared or keyed: it cannot be put in quarantine."
                )
            self._references[block] = 0
            self._active -= 1
            self._quarantined.add(block)

    def end_quarantine(self, blocks: Iterable[int]) -> None:
        """The transport confirmed that nothing writes to these blocks any more."""
        for block in blocks:
            if block not in self._quarantined:
                raise InternalError(f"Block {block} is not in quarantine.")
            self._quarantined.remove(block)
            self._free.append(block)

    def register(self, block: int, key: bytes) -> bool:
        """Make a full, held block findable by `key`. False when another block already has the key
        (two sequences computed the same at the same time): then this one stays without."""
        if self.state(block) not in (BlockState.ACTIVE, BlockState.LEASED):
            raise InternalError(f"Block {block} is {self.state(block)}: it cannot get a key.")
        if self._keys[block] is not None:
            if self._keys[block] != key:
                raise InternalError(f"Block {block} already has another key.")
            return True
        if key in self._by_key:
            return False
        self._keys[block] = key
        self._by_key[key] = block
        self._note(key, True)
        return True

    def lookup(self, key: bytes) -> int | None:
        """The block with this key; `share` or `lease` it before anything else is allocated."""
        return self._by_key.get(key)

    def keys(self) -> bytes:
        """Of all blocks that can be found, concatenated."""
        return b"".join(self._by_key)

    def take_changes(self) -> tuple[bytes, bytes]:
        """Keys that can be found, and keys that cannot any more, since the last call. What came and
        went in between is in neither, so that there never are more than twice the blocks."""
        added = b"".join(key for key, findable in self._changes.items() if findable)
        removed = b"".join(key for key, findable in self._changes.items() if not findable)
        self._changes.clear()
        return added, removed

    def state(self, block: int) -> BlockState:
        if self._leases[block]:
            return BlockState.LEASED
        if self._references[block]:
            return BlockState.ACTIVE
        if block in self._cached:
            return BlockState.CACHED
        if block in self._quarantined:
            return BlockState.QUARANTINED
        return BlockState.FREE

    def counts(self) -> tuple[tuple[BlockState, int], ...]:
        """Blocks by state; sums to the pool's size."""
        return (
            (BlockState.FREE, len(self._free)),
            (BlockState.ACTIVE, self._active),
            (BlockState.CACHED, len(self._cached)),
            (BlockState.LEASED, self._leased),
            (BlockState.QUARANTINED, len(self._quarantined)),
        )

    def check_integrity(
        self,
        references: Mapping[int, int] | None = None,
        leases: Mapping[int, int] | None = None,
    ) -> None:
        """Raise InternalError unless all accounts agree. O(pool): for tests and idle moments.

        `references` and `leases` are the holders' own count per block, when the caller knows them.
        """
        found = Counter(self.state(block) for block in range(self.num_blocks))
        for state, count in self.counts():
            _require(found[state] == count, f"{count} blocks counted {state}, {found[state]} are")
        _require(sum(found.values()) == self.num_blocks, "states do not sum to the pool size")
        _require(len(set(self._free)) == len(self._free), "a block is twice in the free list")
        self._check_unkeyed(self._free, BlockState.FREE)
        self._check_unkeyed(self._quarantined, BlockState.QUARANTINED)
        for block in self._cached:
            if self._keys[block] is None:
                raise _broken(f"cached block {block} has no key")
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        _require(keyed == self._by_key, "the key index differs from the blocks' keys")
        _compare("references", references, self._references)
        _compare("leases", leases, self._leases)

    def _check_unkeyed(self, blocks: Iterable[int], state: BlockState) -> None:
        for block in blocks:
            if self.state(block) is not state:
                raise _broken(f"block {block} is listed as {state} and held")
            if self._keys[block] is not None:
                raise _broken(f"{state} block {block} has a key")

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._keys[block]
        if key is None:
            raise InternalError(f"Block {block} was cached without a key.")
        del self._by_key[key]
        self._keys[block] = None
        self._note(key, False)
        return block

    def _note(self, key: bytes, findable: bool) -> None:
        if self._changes.pop(key, findable) == findable:
            self._changes[key] = findable

    def _retire(self, block: int) -> None:
        """The last holder has gone."""
        if self._keys[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None


def _compare(what: str, expected: Mapping[int, int] | None, actual: Sequence[int]) -> None:
    if expected is None:
        return
    for block, count in enumerate(actual):
        said = expected.get(block, 0)
        if said != count:
            raise _broken(f"block {block} has {count} {what}, its holders say {said}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise _broken(message)


def _broken(message: str) -> InternalError:
    return InternalError(f"Block accounting is broken: {message}.")
