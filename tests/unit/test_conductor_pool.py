"""Pools answer as plain scans over all their workers would, and boards as pools made anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.types.fleet import BlockState, Role, WorkerLoad, WorkerState
from conductor.backlog import Ahead, Backlog
from conductor.cost_model import DecodeCost, WorkerCost
from conductor.matches import Roster
from conductor.views import Board, Column, FleetView, Pool, WorkerView
from tests.fake_worker import worker_info

PLAIN: dict[Column, Callable[[WorkerView], float]] = {
    Column.CAPACITY: lambda worker: worker.capacity,
    Column.FREE_BLOCKS: lambda worker: worker.free_blocks,
    Column.DECODE_LOAD: lambda worker: worker.decode_load,
    Column.FREE_AT: lambda worker: worker.free_at,
    Column.QUEUED_TOKENS: lambda worker: worker.queued_tokens,
    Column.TPOT_S: lambda worker: worker.tpot_s,
    Column.SEQUENCES: lambda worker: worker.sequences,
}
few = st.integers(0, 3)  # so that many are alike


@st.composite
def views(draw: st.DrawFn, name: str = "") -> WorkerView:
    blocks = 100 * draw(st.integers(1, 3))
    free_at = draw(few) / 3
    return WorkerView(
        worker_info(
            name or f"w{draw(st.integers(0, 99))}",
            draw(st.sampled_from([Role.PREFILL, Role.DECODE])),
            num_blocks=blocks,
            max_model_len=draw(st.sampled_from([64, 65536])),
            node=draw(st.sampled_from(["", "a", "b"])),
        ),
        draw(st.sampled_from([WorkerState.LIVE, WorkerState.LIVE, WorkerState.SUSPECT])),
        WorkerLoad(
            running=draw(few),
            waiting_tokens=10 * draw(few),
            blocks=((BlockState.ACTIVE, draw(st.integers(0, blocks))),),
        ),
        backlog=Backlog(10, free_at, (Ahead((0, 0.0), free_at),)) if free_at else Backlog(),
        cost=WorkerCost(decode=DecodeCost(0.02, 1e-3 * draw(few))),
    )


fleets = st.lists(views(), min_size=1, max_size=12, unique_by=lambda view: view.info.name)


@st.composite
def parts(draw: st.DrawFn) -> tuple[Pool, list[WorkerView]]:
    """A pool, or part of one, and the same as a list."""
    workers = draw(fleets)
    pool, plain = Pool.of(workers), workers
    for _ in range(draw(st.integers(0, 2))):
        column, limit = draw(st.sampled_from(list(Column))), draw(few) * 0.5
        pool = pool.where(pool.column(column) >= limit)
        plain = [worker for worker in plain if PLAIN[column](worker) >= limit]
    return pool, plain


def named(workers: Sequence[WorkerView]) -> list[str]:
    return [worker.info.name for worker in workers]


@given(parts(), st.sampled_from(list(Column)))
def test_a_column_has_the_values_of_the_workers(
    part: tuple[Pool, list[WorkerView]], column: Column
) -> None:
    pool, plain = part
    assert list(pool) == plain
    assert list(pool.names) == named(plain)
    assert len(pool) == len(plain)
    assert [pool[index] for index in range(len(pool))] == plain
    assert pool.column(column).tolist() == list(map(PLAIN[column], plain))


@given(parts(), st.sampled_from(list(Column)))
def test_the_least_are_all_that_have_the_smallest_value(
    part: tuple[Pool, list[WorkerView]], column: Column
) -> None:
    pool, plain = part
    if plain:
        least = min(map(PLAIN[column], plain))
        assert list(pool.least(column)) == [w for w in plain if PLAIN[column](w) == least]


@given(parts(), st.text(max_size=3), st.integers(0, 100))
def test_workers_are_drawn_by_name_whatever_their_order(
    part: tuple[Pool, list[WorkerView]], key: str, number: int
) -> None:
    pool, plain = part
    if plain:
        by_name = sorted(plain, key=lambda worker: worker.info.name)
        drawn = by_name[xxhash.xxh3_64_intdigest(key.encode()) % len(plain)]
        assert pool.drawn(key) is drawn
        assert pool.in_turn(number) is by_name[number % len(plain)]


@given(parts(), st.sets(st.integers(0, 99).map("w{}".format)), st.sampled_from([["a"], ["a", "b"]]))
def test_workers_are_found_by_name_and_by_node(
    part: tuple[Pool, list[WorkerView]], names: set[str], nodes: list[str]
) -> None:
    pool, plain = part
    names |= set(named(plain[::2]))
    assert pool.named(names).tolist() == [w.info.name in names for w in plain]
    assert pool.on_nodes(nodes) == [w for w in plain if w.info.node in nodes]
    for name in names:
        assert pool.find(name) is next((w for w in plain if w.info.name == name), None)


@given(parts(), st.dictionaries(st.integers(0, 99).map("w{}".format), few), st.integers(1, 3))
def test_who_has_most_is_first_and_of_equal_ones_by_name(
    part: tuple[Pool, list[WorkerView]], values: dict[str, int], count: int
) -> None:
    pool, plain = part
    values |= dict.fromkeys(named(plain[::2]), 2)
    column = pool.by_name(values)
    assert column.tolist() == [values.get(name, 0) for name in named(plain)]
    having = [w for w in plain if values.get(w.info.name)]
    having.sort(key=lambda w: (-values[w.info.name], w.info.name))
    assert pool.most(column, count) == having[:count]


@given(parts(), st.lists(st.integers(0, 99).map("w{}".format), unique=True))
def test_a_roster_tells_the_index_of_each(
    part: tuple[Pool, list[WorkerView]], names: list[str]
) -> None:
    pool, plain = part
    for known in (names, named(plain), names[1:]):  # rosters change while the pool stays
        index_of = {name: index for index, name in enumerate(known)}
        roster = Roster(tuple(known), index_of)
        found = [index_of.get(worker.info.name, -1) for worker in plain]
        assert pool.indices(roster).tolist() == pool.indices(roster).tolist() == found


@given(fleets, st.data())
def test_a_board_makes_the_pool_of_the_newest_views(
    workers: list[WorkerView], data: st.DataObject
) -> None:
    board = Board(workers)
    before, first = board.pool(), list(workers)
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(workers) - 1))
        changed = data.draw(views(workers[place].info.name))
        workers[place] = replace(changed, info=workers[place].info)
        board.put(workers[place])
    pool, anew = board.pool(), Pool.of(workers)
    assert list(pool) == workers
    for column in Column:
        assert pool.column(column).tolist() == anew.column(column).tolist()
        assert before.column(column).tolist() == list(map(PLAIN[column], first))


@given(fleets)
def test_a_fleet_has_the_live_workers_of_each_role(workers: list[WorkerView]) -> None:
    fleet = FleetView(tuple(workers))
    for role in Role:
        live = [w for w in workers if w.state is WorkerState.LIVE and w.info.role is role]
        assert list(fleet.live(role)) == live
    for worker in workers:
        found = worker if worker.state is WorkerState.LIVE else None
        assert fleet.find(worker.info.name) is found
