"""What routing sees: frozen views of the workers, and of the fleet, at one moment.

A fleet has up to thousands of workers and is looked at for every request, so each view carries what
a scan over all of them compares, and a `Pool` has that in columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt
import xxhash

from baton.types.fleet import BlockState, Peer, Role, WorkerInfo, WorkerLoad, WorkerState
from conductor.backlog import EMPTY, Backlog, Turn
from conductor.cost_model import UNKNOWN_TRANSFERS, UNKNOWN_WORKER, TransferCosts, WorkerCost
from conductor.matches import Counts, Roster
from conductor.ring import Ring

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

_USED = frozenset({BlockState.ACTIVE, BlockState.LEASED, BlockState.QUARANTINED})
_SIXTEENTHS = 1 << 10  # more than a pool has


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker (or store) at one moment.

    `own_attempts` and `backlog` count what this conductor has sent and not seen end; `backlog` only
    the prompts that have no first token yet, `own_decoding` only what the worker decodes and has
    sent tokens of. `seen_at` is the loop time of this view.
    """

    info: WorkerInfo
    state: WorkerState
    load: WorkerLoad
    own_attempts: int = 0
    own_decoding: int = field(default=0, kw_only=True)
    backlog: Backlog = EMPTY
    cost: WorkerCost = UNKNOWN_WORKER
    seen_at: float = 0.0
    foreign_s: float = field(init=False)  # prompts of which only the worker's report tells
    free_at: float = field(init=False)  # loop time by which all prompts should be computed
    sequences: int = field(init=False)
    capacity: int = field(init=False)  # tokens of the longest sequence that can ever fit
    free_blocks: int = field(init=False)  # free, or cached and evictable
    decode_load: int = field(init=False)  # by sequences, then by the share of its blocks in use
    tpot_s: float = field(init=False)  # predicted, when one more sequence joins

    def __post_init__(self) -> None:
        load, info, free_at = self.load, self.info, self.backlog.free_at
        foreign, foreign_s = load.waiting_tokens - self.backlog.tokens, 0.0
        if foreign > 0:
            foreign_s = self.cost.prefill.queue_s(foreign)
            free_at = max(free_at, self.seen_at) + foreign_s
        used = 0
        for state, count in load.blocks:
            if state in _USED:
                used += count
        sequences = max(load.running + load.waiting, self.own_attempts)
        derive = object.__setattr__  # one by one: views are made for every request
        derive(self, "foreign_s", foreign_s)
        derive(self, "free_at", free_at)
        derive(self, "sequences", sequences)
        derive(self, "capacity", min(info.max_model_len, info.num_blocks * info.layout.block_size))
        derive(self, "free_blocks", max(info.num_blocks - used, 0))
        # In sixteenths, so that pools that are nearly as full tie.
        full = 16 * used // max(info.num_blocks, 1)
        derive(self, "decode_load", sequences * _SIXTEENTHS + full)
        derive(self, "tpot_s", self.cost.decode.seconds(sequences + 1))

    @property
    def peer(self) -> Peer:
        return Peer(self.info.name, self.info.incarnation, self.info.address)

    @property
    def own_prompt_tokens(self) -> int:
        return self.backlog.tokens

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens still to be computed. Our own count is fresher, the report sees others."""
        return max(self.load.waiting_tokens, self.backlog.tokens)

    def queue_s(self, now: float, turn: Turn) -> float:
        """Seconds until a prompt of that turn that arrives now would begin to be computed."""
        ahead_s = self.backlog.ahead_s(now, turn) + self.foreign_s
        overtaken_s = self.backlog.overtaken_s(turn)
        if overtaken_s > 0:  # its step goes on to its end, half of one on average
            step_s = self.cost.prefill.queue_s(self.info.step_tokens)
            ahead_s += min(overtaken_s, step_s / 2)
        return ahead_s


class Column(IntEnum):
    """What the workers of a pool are compared by; exact, as far as floats hold integers."""

    CAPACITY = 0
    FREE_BLOCKS = 1
    DECODE_LOAD = 2
    FREE_AT = 3
    QUEUED_TOKENS = 4
    TPOT_S = 5
    SEQUENCES = 6


def _column_values(worker: WorkerView) -> tuple[float, ...]:
    return (
        worker.capacity,
        worker.free_blocks,
        worker.decode_load,
        worker.free_at,
        worker.queued_tokens,
        worker.tpot_s,
        worker.sequences,
    )


class _Crew:
    """Who is in a pool: the same for all that are made until somebody comes or goes."""

    def __init__(self, workers: Sequence[WorkerView]) -> None:
        names = [worker.info.name for worker in workers]
        self.place = {name: place for place, name in enumerate(names)}
        self.by_name: list[int] = sorted(range(len(names)), key=names.__getitem__)
        self.rank: Places = np.argsort(np.array(self.by_name, np.intp))  # of each, by name
        self._workers = workers
        self._indices: tuple[Roster, Places] | None = None

    def indices(self, roster: Roster) -> Places:
        """Of each, its index there; -1 of those that are not in it. Kept: rosters change rarely."""
        if self._indices is None or self._indices[0] is not roster:
            found = [roster.index_of.get(name, -1) for name in self.place]
            self._indices = (roster, np.array(found, np.intp))
        return self._indices[1]

    @cached_property
    def nodes(self) -> Mapping[str, list[int]]:
        nodes: dict[str, list[int]] = {}
        for place, worker in enumerate(self._workers):
            nodes.setdefault(worker.info.node, []).append(place)
        return nodes


class Pool(Sequence[WorkerView]):
    """Some workers in the order of the fleet, for scans over all of them. Never changes.

    `table` [columns, workers of the crew] has a value for each; `places` are those of the crew that
    are in this pool, ascending, and None all of them.
    """

    __slots__ = ("_crew", "_places", "_table", "_views")

    def __init__(
        self,
        crew: _Crew,
        views: tuple[WorkerView, ...],
        table: Floats,
        places: Places | None = None,
    ) -> None:
        self._crew = crew
        self._views = views
        self._table = table
        self._places = places

    @classmethod
    def of(cls, workers: Iterable[WorkerView]) -> Pool:
        return Board(tuple(workers)).pool()

    def __len__(self) -> int:
        return len(self._views) if self._places is None else len(self._places)

    @overload
    def __getitem__(self, index: int) -> WorkerView: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[WorkerView]: ...

    def __getitem__(self, index: int | slice) -> WorkerView | Sequence[WorkerView]:
        if self._places is None:
            return self._views[index]
        if isinstance(index, slice):
            return tuple(self)[index]
        return self._views[int(self._places[index])]

    def __iter__(self) -> Iterator[WorkerView]:
        if self._places is None:
            return iter(self._views)
        return map(self._views.__getitem__, self._places.tolist())

    @property
    def names(self) -> Iterable[str]:
        """In the same order."""
        if self._places is None:
            return self._crew.place
        return [worker.info.name for worker in self]

    def column(self, which: Column) -> Floats:
        """[workers]; not to be written to."""
        row: Floats = self._table[which]
        return row if self._places is None else row[self._places]

    def indices(self, roster: Roster) -> Places:
        """[workers]: the index of each there, or -1; not to be written to."""
        indices = self._crew.indices(roster)
        return indices if self._places is None else indices[self._places]

    def by_name(self, values: Mapping[str, int]) -> Counts:
        """[workers]: the value of each, 0 where there is none."""
        column = np.zeros(len(self._views), np.int64)
        for name, value in values.items():
            if (place := self._crew.place.get(name)) is not None:
                column[place] = value
        return column if self._places is None else column[self._places]

    def where(self, kept: npt.NDArray[np.bool_]) -> Pool:
        """Part of it: `kept` [workers] says which."""
        if np.count_nonzero(kept) == len(kept):
            return self
        places = kept.nonzero()[0]
        if self._places is not None:
            places = self._places[places]
        return Pool(self._crew, self._views, self._table, places)

    def least(self, which: Column) -> Pool:
        """Those with the smallest value."""
        if len(self) == 1:
            return self
        values = self.column(which)
        return self.where(values == values.min())

    def most(self, values: Counts, count: int) -> list[WorkerView]:
        """Those with the largest of `values` [workers], the largest first, equal ones by name: so
        many, if as many have more than 0."""
        having = values.nonzero()[0]
        if having.size > 1:
            ranks = self._crew.rank if self._places is None else self._crew.rank[self._places]
            order = ranks[having] - values[having] * len(self._views)
            if having.size > count:
                first = np.argpartition(order, count)[:count]
                having, order = having[first], order[first]
            having = having[order.argsort()]
        return [self[place] for place in having.tolist()]

    def drawn(self, key: str) -> WorkerView:
        """One of them by the hash of `key`, whatever their order."""
        if len(self) == 1:
            return self[0]
        return self.in_turn(xxhash.xxh3_64_intdigest(key.encode()))

    def in_turn(self, number: int) -> WorkerView:
        """The one with this number, modulo their count, by name."""
        number %= len(self)
        if self._places is None:
            return self._views[self._crew.by_name[number]]
        ranks = self._crew.rank[self._places]
        return self._views[self._crew.by_name[int(np.partition(ranks, number)[number])]]

    def find(self, name: str) -> WorkerView | None:
        place = self._crew.place.get(name)
        return self._views[place] if place is not None and self._has(place) else None

    def named(self, names: Iterable[str]) -> npt.NDArray[np.bool_]:
        """[workers]: which have one of these names."""
        marks = np.zeros(len(self._views), np.bool_)
        marks[[self._crew.place[name] for name in names if name in self._crew.place]] = True
        return marks if self._places is None else marks[self._places]

    def on_nodes(self, nodes: Iterable[str]) -> list[WorkerView]:
        known = self._crew.nodes
        places = sorted([place for node in nodes for place in known.get(node, ())])
        if self._places is not None:
            marks = np.zeros(len(self._views), np.bool_)
            marks[self._places] = True
            inside = marks.tolist()
            places = [place for place in places if inside[place]]
        return list(map(self._views.__getitem__, places))

    def _has(self, place: int) -> bool:
        if self._places is None:
            return True
        at = int(self._places.searchsorted(place))
        return at < len(self._places) and int(self._places[at]) == place


class Board:
    """The newest views of the same workers, of which pools are made."""

    def __init__(self, workers: Sequence[WorkerView]) -> None:
        self._crew = _Crew(workers)
        self._views = list(workers)
        rows = [_column_values(worker) for worker in workers]
        table = np.array(rows, np.float64).reshape(len(rows), len(Column))
        self._table: Floats = np.ascontiguousarray(table.T)
        self._pool: Pool | None = None

    def put(self, view: WorkerView) -> None:
        """In the place of the one before of the same worker. Ignored when there was none."""
        place = self._crew.place.get(view.info.name)
        if place is not None:
            self._views[place] = view
            self._table[:, place] = _column_values(view)
            self._pool = None

    def pool(self) -> Pool:
        """All of them as they are now."""
        if self._pool is None:
            self._pool = Pool(self._crew, tuple(self._views), self._table.copy())
        return self._pool


@dataclass(frozen=True, slots=True)
class FleetView:
    """`ring` is over the live prefill workers, or without these over the decode workers; None when
    there are none. `ttft_factor` is what estimates of TTFT have lately had to be multiplied by.
    `pools`, of live workers by role, can be given by who has them already."""

    workers: tuple[WorkerView, ...]
    ring: Ring | None = None
    transfers: TransferCosts = UNKNOWN_TRANSFERS
    ttft_factor: float = 1.0
    pools: Mapping[Role, Pool] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.pools:
            pools = {role: board.pool() for role, board in boards_of(self.workers).items()}
            object.__setattr__(self, "pools", pools)

    def live(self, role: Role) -> Pool:
        return self.pools[role]

    def find(self, name: str) -> WorkerView | None:
        """The live worker or store of that name."""
        for pool in self.pools.values():
            if (found := pool.find(name)) is not None:
                return found
        return None


def boards_of(workers: Iterable[WorkerView]) -> dict[Role, Board]:
    """Of the live ones."""
    live: dict[Role, list[WorkerView]] = {role: [] for role in Role}
    for worker in workers:
        if worker.state is WorkerState.LIVE:
            live[worker.info.role].append(worker)
    return {role: Board(some) for role, some in live.items()}
