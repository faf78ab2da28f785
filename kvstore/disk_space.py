"""The segments of an open NVMe tier: which there are, and which one goes when room is needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPARSE = 0.5
"""A segment with no more than that much of it alive is moved together: it costs a read and a write
of half a segment, and gives back at least as much."""


@dataclass(slots=True, eq=False)
class Segment:
    """A file, as long as it is open. `ordinal` says which locations of the index are its own."""

    number: int
    ordinal: int
    path: Path
    fd: int
    used: int = 0  # positions that were handed out to writers
    live: int = 0  # records that are indexed
    users: int = 0  # reads and writes under way
    writers: int = 0  # of these
    last_use: int = 0
    dropped: bool = False  # its file is unlinked; the descriptor lives until `users` is 0


class Segments:
    """The only owner of ordinals and of the order of use."""

    def __init__(self, most: int, records: int) -> None:
        self.most = most
        self._records = records
        self._by_ordinal: dict[int, Segment] = {}
        self._free = list(reversed(range(most)))
        self._clock = 0
        self._next_number = 1

    def __len__(self) -> int:
        return len(self._by_ordinal)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._by_ordinal.values())

    @property
    def full(self) -> bool:
        return not self._free

    def new_number(self) -> int:
        """Greater than that of every segment that was ever added."""
        return self._next_number

    def add(self, number: int, path: Path, fd: int) -> Segment:
        """There must be room."""
        segment = Segment(number, self._free.pop(), path, fd)
        self._by_ordinal[segment.ordinal] = segment
        self._next_number = max(self._next_number, number + 1)
        self.touch(segment)
        return segment

    def skip_number(self, number: int) -> None:
        """A file of that number was found, and is not used."""
        self._next_number = max(self._next_number, number + 1)

    def remove(self, segment: Segment) -> None:
        del self._by_ordinal[segment.ordinal]
        self._free.append(segment.ordinal)

    def touch(self, segment: Segment) -> None:
        self._clock += 1
        segment.last_use = self._clock

    def at(self, location: int) -> tuple[Segment, int]:
        """The segment of a location, and the position in it."""
        ordinal, position = divmod(location, self._records)
        return self._by_ordinal[ordinal], position

    def location(self, segment: Segment, position: int) -> int:
        return segment.ordinal * self._records + position

    def oldest(self) -> Segment | None:
        """The one to give up: an empty one, else that which was used longest ago."""
        return min(self, key=lambda one: (one.live + one.users > 0, one.last_use), default=None)

    def sparse(self, but: Segment) -> Segment | None:
        """The emptiest one other than `but`, when it is worth moving and nobody is at it."""
        others = (one for one in self if one is not but and not one.users)
        emptiest = min(others, key=lambda one: one.live, default=None)
        if emptiest is None or emptiest.live > SPARSE * self._records:
            return None
        return emptiest
