"""The CPU tier: blocks in fixed-size slots of shared memory, found again after a restart.

    FREE     holds nothing
    CLAIMED  an earlier process filled it, says its header; nobody has verified it yet
    FILLING  belongs to who writes it (a transport's read, a read from disk) until commit or abort
    READY    keyed and complete; never changes until it is evicted, which no pin allows

A READY block is sealed, with a checksum and a header that a later process believes, or not yet: its
header is blank, and it would not outlive this process.

A pin says that somebody reads the slot, or wants it to stay. Who pins also unpins. Every operation
is O(1), a victim O(log n). Not thread-safe: belongs to the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from baton.errors import InternalError
from kvstore.eviction import EvictionPolicy
from kvstore.format import NO_PARENT, BlockInfo
from kvstore.journal import TierChanges
from kvstore.slot_table import SlotTable, StoredSlot


class SlotState(StrEnum):
    FREE = "free"
    CLAIMED = "claimed"
    FILLING = "filling"
    READY = "ready"


@dataclass(frozen=True, slots=True)
class Claim:
    """What the header of a CLAIMED slot says."""

    slot: int
    stored: StoredSlot


@dataclass(slots=True, eq=False)  # not frozen: that takes three times as long to make
class Put:
    """A block that is not sealed. One of the same key that comes later is another Put."""

    key: bytes
    slot: int
    depth: int
    parent: bytes
    generation: int = 0  # from its commit on


class MemoryTier:
    """`payload` is the slots' area, one after the other; a transport may serve it to others."""

    def __init__(
        self,
        payload: memoryview,
        table: SlotTable,
        block_bytes: int,
        policy: EvictionPolicy,
        changes: TierChanges,
    ) -> None:
        self.num_slots = payload.nbytes // block_bytes
        if len(table) < self.num_slots:
            raise InternalError(f"{len(table)} headers cannot describe {self.num_slots} slots.")
        self.block_bytes = block_bytes
        self._payload = payload
        self._table = table
        self._policy = policy
        self._changes = changes
        self._generation = 0
        self._free = list(reversed(range(self.num_slots)))  # a stack
        self._claimed: set[int] = set()
        self._filling: dict[bytes, Put] = {}
        self._ready: dict[bytes, int] = {}
        self._unsealed: dict[bytes, Put] = {}  # READY, too
        self._infos: list[BlockInfo | None] = [None] * self.num_slots  # of sealed slots
        self._pins = [0] * self.num_slots
        self._pinned = 0  # slots with a pin
        self._settled: Callable[[bytes], None] | None = None

    def watch(self, settled: Callable[[bytes], None]) -> None:
        """Call `settled` with each key that becomes READY, or was aborted."""
        self._settled = settled

    @property
    def free(self) -> int:
        return len(self._free)

    def claim(self) -> list[Claim]:
        """Slots that an earlier process filled, oldest first: CLAIMED, until `settle` of each.

        Looks at the headers only. Call it once, before anything else.
        """
        claims = [
            Claim(slot, stored)
            for slot in range(self.num_slots)
            if (stored := self._table.read(slot)) is not None
        ]
        # As they were put: parents before children, and the policy's order.
        claims.sort(key=lambda claim: (claim.stored.generation, claim.slot))
        if claims:
            self._generation = claims[-1].stored.generation
        self._claimed = {claim.slot for claim in claims}
        self._free = [s for s in reversed(range(self.num_slots)) if s not in self._claimed]
        for slot in self._free:
            self._table.clear(slot)  # torn, or of another layout
        return claims

    def settle(self, claim: Claim, found: bytes) -> bool:
        """The claimed slot's payload has that checksum. It becomes READY; or FREE when the payload
        is not its block's, or the block came anew meanwhile. Whether it is READY."""
        self._claimed.remove(claim.slot)
        info = claim.stored.info
        good = found == info.checksum and not (info.key in self._ready or info.key in self._filling)
        if good:
            self._infos[claim.slot] = info
            self._adopt(claim.slot, info.key, info.depth, info.parent)
        else:
            self._table.clear(claim.slot)
            self._free.append(claim.slot)
        return good

    def view(self, slot: int) -> memoryview:
        """The slot's bytes; writable, for who fills it only."""
        return self._payload[slot * self.block_bytes : (slot + 1) * self.block_bytes]

    def begin(self, key: bytes, depth: int = 0, parent: bytes = NO_PARENT) -> int | None:
        """A slot to fill, or None when none is FREE. The key must be neither READY nor FILLING."""
        if key in self._ready or key in self._filling:
            raise InternalError("A block that is stored was to be stored again.")
        if not self._free:
            return None
        slot = self._free.pop()  # its header is blank since it became FREE
        self._filling[key] = Put(key, slot, depth, parent)
        return slot

    def commit(self, key: bytes) -> Put:
        """The payload is complete: FILLING becomes READY, and is to be sealed."""
        put = self._take_filling(key)
        self._generation += 1
        put.generation = self._generation
        self._unsealed[key] = put
        self._adopt(put.slot, key, put.depth, put.parent)
        return put

    def seal(self, put: Put, found: bytes) -> None:
        """The payload had that checksum when it was read after its commit: the block is durable
        against a killed process. Nothing happens if it was evicted or sealed meanwhile."""
        if not self.is_unsealed(put):
            return
        del self._unsealed[put.key]
        info = BlockInfo(put.key, put.depth, put.parent, found)
        self._table.write(put.slot, info, put.generation)
        self._infos[put.slot] = info

    def commit_verified(self, info: BlockInfo) -> None:
        """As `commit` and `seal`, when the caller knows that the checksum is that of the payload.
        What is known of its place in a chain is the description's."""
        slot = self._take_filling(info.key).slot
        self._generation += 1
        self._table.write(slot, info, self._generation)
        self._infos[slot] = info
        self._adopt(slot, info.key, info.depth, info.parent)

    def abort(self, key: bytes) -> None:
        """Nobody writes to the FILLING slot any more, and it is not complete."""
        self._free.append(self._take_filling(key).slot)
        if self._settled is not None:
            self._settled(key)

    def hit(self, key: bytes) -> None:
        self._policy.on_hit(key)

    def slot_of(self, key: bytes) -> int | None:
        """Of a READY block. Valid until the next call that may evict, or while it is pinned."""
        return self._ready.get(key)

    def is_filling(self, key: bytes) -> bool:
        return key in self._filling

    def info(self, key: bytes) -> BlockInfo:
        """Of a sealed block."""
        info = self._infos[self._ready[key]]
        if info is None:
            raise InternalError("A block was asked for its checksum that is not sealed.")
        return info

    def parent_of(self, key: bytes) -> bytes:
        """Of a READY block: the key before it in its chain, or NO_PARENT."""
        put = self._unsealed.get(key)
        return self.info(key).parent if put is None else put.parent

    @property
    def unsealed(self) -> int:
        """READY blocks that would not outlive this process."""
        return len(self._unsealed)

    def unsealed_put(self, key: bytes) -> Put | None:
        return self._unsealed.get(key)

    def is_unsealed(self, put: Put) -> bool:
        """Whether it is neither sealed nor evicted."""
        return self._unsealed.get(put.key) is put

    def __contains__(self, key: object) -> bool:
        return key in self._ready

    def __len__(self) -> int:
        return len(self._ready)

    def __iter__(self) -> Iterator[bytes]:
        """Keys of READY blocks."""
        return iter(self._ready)

    def pin(self, key: bytes, count: int = 1) -> int:
        """Add pins to a READY block; its slot."""
        slot = self._ready[key]
        if count and self._pins[slot] == 0:
            self._pinned += 1
            self._policy.hold(key)
        self._pins[slot] += count
        return slot

    def unpin(self, key: bytes) -> None:
        slot = self._ready.get(key)
        if slot is None or self._pins[slot] == 0:
            raise InternalError("A block was unpinned that has no pin.")
        self._pins[slot] -= 1
        if self._pins[slot] == 0:
            self._pinned -= 1
            self._policy.release(key)

    def victim(self) -> bytes | None:
        """The block to evict next, by the policy; None when none can be."""
        return self._policy.victim()

    def evict(self, key: bytes) -> None:
        """READY becomes FREE. The block must not be pinned."""
        slot = self._ready[key]
        if self._pins[slot]:
            raise InternalError("A pinned block was to be evicted.")
        del self._ready[key]
        self._policy.on_remove(key)
        if self._unsealed.pop(key, None) is None:
            self._infos[slot] = None
            self._table.clear(slot)
        self._free.append(slot)
        self._changes.remove(key)

    def counts(self) -> tuple[tuple[SlotState, int], ...]:
        """Slots by state; sums to `num_slots`."""
        return (
            (SlotState.FREE, len(self._free)),
            (SlotState.CLAIMED, len(self._claimed)),
            (SlotState.FILLING, len(self._filling)),
            (SlotState.READY, len(self._ready)),
        )

    @property
    def pinned(self) -> int:
        """READY slots with at least one pin."""
        return self._pinned

    def pins(self) -> dict[bytes, int]:
        """Pins by key."""
        return {key: self._pins[slot] for key, slot in self._ready.items() if self._pins[slot]}

    def check_integrity(self) -> None:
        """Raise InternalError unless all accounts agree. O(slots)."""
        filling = [one.slot for one in self._filling.values()]
        slots = Counter([*self._free, *self._claimed, *filling, *self._ready.values()])
        _require(slots == Counter(range(self.num_slots)), "a slot is not in exactly one state")
        _require(not self._filling.keys() & self._ready.keys(), "a key is both filling and ready")
        _require(len(self._policy) == len(self._ready), "the policy knows other blocks")
        for key, put in self._unsealed.items():
            _require(self._ready.get(key) == put.slot, f"unsealed slot {put.slot} is not ready")
        for key in self._ready.keys() - self._unsealed.keys():
            slot = self._ready[key]
            stored = self._table.read(slot)
            _require(self.info(key).key == key, f"slot {slot} is described as another block")
            _require(
                stored is not None and stored.info == self._infos[slot],
                f"the header of sealed slot {slot} differs",
            )
        for slot in [*self._free, *self._claimed, *filling]:
            _require(self._pins[slot] == 0, f"slot {slot} is not ready and pinned")
        unsealed = [put.slot for put in self._unsealed.values()]
        for slot in [*self._free, *self._claimed, *filling, *unsealed]:
            _require(self._infos[slot] is None, f"slot {slot} is not sealed and described")
        for slot in [*self._free, *filling, *unsealed]:
            _require(self._table.read(slot) is None, f"slot {slot} is not sealed and has a header")
        _require(self._pinned == len(self.pins()), "pinned slots were miscounted")

    def _take_filling(self, key: bytes) -> Put:
        put = self._filling.pop(key, None)
        if put is None:
            raise InternalError("A block was to be finished that nobody has begun.")
        return put

    def _adopt(self, slot: int, key: bytes, depth: int, parent: bytes) -> None:
        self._ready[key] = slot
        self._policy.on_insert(key, depth, parent)
        self._changes.add(key)
        if self._settled is not None:
            self._settled(key)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InternalError(f"Slot accounting is broken: {message}.")
