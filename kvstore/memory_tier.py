"""The CPU tier: blocks in fixed-size slots of shared memory, found again after a restart.

    FREE     holds nothing
    CLAIMED  an earlier process filled it, says its header; nobody has verified it yet
    FILLING  belongs to who writes it (a transport's read, a read from disk) until commit or abort
    READY    keyed, complete and verified; never changes until it is evicted, which no pin allows

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
from kvstore.format import NO_PARENT, BlockInfo, checksum
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


@dataclass(slots=True)  # not frozen: that takes three times as long to make, for every put
class _Filling:
    slot: int
    depth: int
    parent: bytes


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
        self._filling: dict[bytes, _Filling] = {}
        self._ready: dict[bytes, int] = {}
        self._infos: list[BlockInfo | None] = [None] * self.num_slots  # of READY slots
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
            self._adopt(claim.slot, info)
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
        self._filling[key] = _Filling(slot, depth, parent)
        return slot

    def filling_view(self, key: bytes) -> memoryview:
        """The bytes of a FILLING slot."""
        return self.view(self._filling_of(key).slot)

    def commit(self, key: bytes) -> None:
        """The payload is complete: FILLING becomes READY, and durable against a killed process."""
        self.commit_hashed(key, checksum(self.filling_view(key)))

    def commit_hashed(self, key: bytes, found: bytes) -> None:
        """As `commit`, with the payload's checksum."""
        filling = self._filling_of(key)
        self._commit(filling.slot, BlockInfo(key, filling.depth, filling.parent, found))

    def commit_verified(self, info: BlockInfo) -> None:
        """As `commit`, when the caller knows that the checksum is that of the payload."""
        self._commit(self._filling_of(info.key).slot, info)

    def _commit(self, slot: int, info: BlockInfo) -> None:
        del self._filling[info.key]
        self._generation += 1
        self._table.write(slot, info, self._generation)
        self._adopt(slot, info)

    def abort(self, key: bytes) -> None:
        """Nobody writes to the FILLING slot any more, and it is not complete."""
        self._free.append(self._filling_of(key).slot)
        del self._filling[key]
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
        """Of a READY block."""
        info = self._infos[self._ready[key]]
        if info is None:
            raise InternalError("A ready block has no description.")
        return info

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
        self._infos[slot] = None
        self._policy.on_remove(key)
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
        for key, slot in self._ready.items():
            stored = self._table.read(slot)
            _require(self.info(key).key == key, f"slot {slot} is described as another block")
            _require(
                stored is not None and stored.info == self._infos[slot],
                f"the header of ready slot {slot} differs",
            )
        for slot in [*self._free, *self._claimed, *filling]:
            _require(self._infos[slot] is None, f"slot {slot} is not ready and described")
            _require(self._pins[slot] == 0, f"slot {slot} is not ready and pinned")
        for slot in [*self._free, *filling]:
            _require(self._table.read(slot) is None, f"slot {slot} is not ready and has a header")
        _require(self._pinned == len(self.pins()), "pinned slots were miscounted")

    def _filling_of(self, key: bytes) -> _Filling:
        filling = self._filling.get(key)
        if filling is None:
            raise InternalError("A block was to be finished that nobody has begun.")
        return filling

    def _adopt(self, slot: int, info: BlockInfo) -> None:
        self._ready[info.key] = slot
        self._infos[slot] = info
        self._policy.on_insert(info.key, info.depth, info.parent)
        self._changes.add(info.key)
        if self._settled is not None:
            self._settled(info.key)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InternalError(f"Slot accounting is broken: {message}.")
