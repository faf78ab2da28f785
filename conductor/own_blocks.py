"""How many leading blocks of a prompt workers have in their own pools."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from conductor.matches import Counts, Roster
from conductor.views import Pool


@dataclass(frozen=True, slots=True, eq=False)
class Crowd:
    """Holders of a beginning that many have: `blocks` by their index in the roster, as
    `Matches.lengths`."""

    roster: Roster
    blocks: Counts

    def of(self, worker: str) -> int:
        return int(self.blocks[self.roster.index_of.get(worker, -1)])

    def within(self, workers: Pool) -> Counts:
        column: Counts = self.blocks[workers.indices(self.roster)]
        return column


@dataclass(frozen=True, slots=True, eq=False)
class OwnBlocks:
    """`few` by name; who is in the crowd, too, has what is more."""

    few: Mapping[str, int]
    crowd: Crowd | None = None

    def __bool__(self) -> bool:
        """Whether anybody may have some."""
        return self.crowd is not None or bool(self.few)

    def of(self, worker: str) -> int:
        blocks = self.few.get(worker, 0)
        return blocks if self.crowd is None else max(blocks, self.crowd.of(worker))

    def within(self, workers: Pool) -> Counts:
        """[workers], for the caller to keep."""
        column = workers.by_name(self.few)
        return column if self.crowd is None else np.maximum(column, self.crowd.within(workers))
