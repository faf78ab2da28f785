"""Who has how much of the beginning of a chain of blocks: what the prefix map answers.

A system prompt may have a thousand holders, and a decision wants a few of them. So holders stay in
the sets that the map has them in (`holder_sets`) until somebody asks for single ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from baton.types.kv_events import Tier
from conductor.holder_sets import fastest_bits, holders_in, pair_of

Counts = npt.NDArray[np.int64]

_CROWD_BITS = 192  # of all sets together; one holder has at most three


class Match(NamedTuple):
    """The leading blocks of a chain that a holder has, each in `tier` or in a faster one."""

    holder: str  # worker or store
    tier: Tier  # slowest tier among those blocks
    blocks: int  # > 0


@dataclass(frozen=True, slots=True, eq=False)
class Roster:
    """Names of holders by the index that their bits in a set stand for, and the other way round.
    Never changes: the prefix map makes another one when somebody comes or goes."""

    names: tuple[str, ...] = ()
    index_of: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Longest first. A holder that has more of the chain when slower tiers count, too, is there
    once per such tier.

    `runs` are (blocks, `reach` of those whose match in some tier ends there).
    """

    roster: Roster = Roster()
    runs: tuple[tuple[int, int], ...] = ()

    def __iter__(self) -> Iterator[Match]:
        names = self.roster.names
        for blocks, reached in self.runs:
            for bit in fastest_bits(reached):
                index, tier = pair_of(bit)
                yield Match(names[index], tier, blocks)

    @property
    def is_crowd(self) -> bool:
        """Whether there are so many that they should not be looked at one by one."""
        return sum([reached.bit_count() for _, reached in self.runs]) > _CROWD_BITS

    def lengths(self) -> Counts:
        """[holders + 1] blocks that each has, whatever the tier, by its index; the last one, 0, is
        of nobody."""
        lengths = np.zeros(len(self.roster.names) + 1, np.int64)
        for blocks, reached in reversed(self.runs):  # the longest match of a holder is what stays
            lengths[holders_in(reached)] = blocks
        return lengths


NO_MATCHES = Matches()
