"""Consistent hashing with bounded loads: which workers a group of prompts belongs to.

Every name has many points on a circle of 64-bit numbers (Karger et al. 1997); a group belongs to
the names that follow its own point, clockwise. When a name leaves, only groups on its arcs move,
to many others. No name gets more than its share of the load times a bound: who is full is passed
over (Mirrokni, Thorup, Zadimoghaddam 2017: "Consistent Hashing with Bounded Loads").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import xxhash

# A name's share of the circle deviates by 1/sqrt(points), 3 %: with 100 names, hardly one has
# more than 1.1 times the average.
VIRTUAL_NODES = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Ring:
    """Never changes: `with_` and `without` make new ones, in a few milliseconds for 1,000 names.

    `points` and `owner_of` [names * virtual_nodes] are sorted by point; `owner_of` has indices of
    `names`, where a name that left is None.
    """

    names: tuple[str | None, ...]
    virtual_nodes: int
    points: npt.NDArray[np.uint64]
    owner_of: npt.NDArray[np.int32]

    @classmethod
    def of(cls, names: Iterable[str], virtual_nodes: int = VIRTUAL_NODES) -> Self:
        """Equal names in any order make equal rings."""
        distinct = tuple(dict.fromkeys(names))
        nothing = np.zeros(0, np.uint64)
        points = np.concatenate([nothing, *(_points(name, virtual_nodes) for name in distinct)])
        owners = np.repeat(np.arange(len(distinct), dtype=np.int32), virtual_nodes)
        order = np.argsort(points, kind="stable")
        return cls(distinct, virtual_nodes, points[order], owners[order])

    def __len__(self) -> int:
        return self.points.size // self.virtual_nodes

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def with_(self, name: str) -> Self:
        """With one more name; itself when the name is there."""
        if name in self.names:
            return self
        new = np.sort(_points(name, self.virtual_nodes))
        at = np.searchsorted(self.points, new)
        names, index = self._names_with(name)
        return type(self)(
            names,
            self.virtual_nodes,
            np.insert(self.points, at, new),
            np.insert(self.owner_of, at, index),
        )

    def without(self, name: str) -> Self:
        """Without a name; itself when the name is not there."""
        if name not in self.names:
            return self
        index = self.names.index(name)
        stays = self.owner_of != index
        names = (*self.names[:index], None, *self.names[index + 1 :])
        return type(self)(names, self.virtual_nodes, self.points[stays], self.owner_of[stays])

    def owners(self, group: bytes, count: int) -> tuple[str, ...]:
        """The first `count` different names clockwise of the group; all when there are fewer."""
        found: list[str] = []
        for name in self._clockwise(group):
            if len(found) == count:
                break
            found.append(name)
        return tuple(found)

    def choose(self, group: bytes, loads: Mapping[str, float], bound: float = 1.25) -> str:
        """The first name clockwise whose load is below ceil(bound * average), one request included.

        `loads` are in requests, 0 where missing; names that are not in the ring do not count. With
        `bound` >= 1 somebody is always below. Raises ValueError for an empty ring.
        """
        total = sum(loads.get(name, 0.0) for name in self.names if name is not None)
        limit = math.ceil(bound * (total + 1) / max(len(self), 1))
        for name in self._clockwise(group):
            if loads.get(name, 0.0) < limit:
                return name
        raise ValueError("nobody to choose from: the ring is empty, or the bound is below 1")

    def shares(self) -> dict[str, float]:
        """What part of the circle each name owns; they sum up to 1."""
        arcs = np.diff(self.points, prepend=self.points[-1:])
        sums = np.bincount(self.owner_of, weights=arcs / 2.0**64, minlength=len(self.names))
        return {
            name: share
            for name, share in zip(self.names, sums.tolist(), strict=True)
            if name is not None
        }

    def _clockwise(self, group: bytes) -> Iterator[str]:
        """All names, in the order in which their first points follow the group's."""
        seen = set()
        start = int(self.points.searchsorted(np.uint64(xxhash.xxh3_64_intdigest(group))))
        wanted = len(self)
        for begin, end in _chunks(start, self.points.size):
            for index in self.owner_of[begin:end].tolist():
                if index not in seen:
                    seen.add(index)
                    name = self.names[index]
                    assert name is not None
                    yield name
            if len(seen) == wanted:
                return

    def _names_with(self, name: str) -> tuple[tuple[str | None, ...], int]:
        if None not in self.names:
            return (*self.names, name), len(self.names)
        index = self.names.index(None)
        return (*self.names[:index], name, *self.names[index + 1 :]), index


def _chunks(start: int, size: int) -> Iterator[tuple[int, int]]:
    """Ranges around the circle, short ones first: most callers want only a few owners."""
    length = 16
    for begin, end in ((start, size), (0, start)):
        while begin < end:
            yield begin, min(begin + length, end)
            begin, length = begin + length, 2 * length


def _points(name: str, count: int) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014), seeded with the hash of the name."""
    seed = np.uint64(xxhash.xxh3_64_intdigest(name.encode()))
    z = seed + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
