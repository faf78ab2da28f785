"""What fits where, and how many a pool should have: the pure parts."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from baton.ray.config import Restart, Scale
from baton.ray.keeper import pause_s
from baton.ray.place import Node
from baton.ray.placement import Wish, fits, free_on, room, take, why_not, wishes
from baton.ray.scale import Scaler, planner_says, wanted_of
from tests.unit.ray_kit import NODE_A, NODE_B, config

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
bundles = st.dictionaries(
    st.sampled_from(["CPU", "GPU", "decode"]), st.sampled_from([0.25, 0.5, 1, 2]), min_size=1
)
totals = st.dictionaries(st.sampled_from(["CPU", "GPU", "decode"]), st.integers(0, 4))
machines = st.lists(totals, max_size=3).map(
    lambda found: [Node(f"{i}" * 8, f"10.0.0.{i}", total) for i, total in enumerate(found)]
)


def can_be_placed(wish: Wish, nodes: list[Node]) -> bool:
    """By trying every way to put the bundles on nodes."""
    for where in itertools.product(nodes, repeat=wish.count):
        if wish.strategy == "STRICT_SPREAD" and len({n.id for n in where}) < wish.count:
            continue
        if wish.strategy == "STRICT_PACK" and len({n.id for n in where}) > 1:
            continue
        frees = [free_on(node, [wish.bundle] * where.count(node)) for node in nodes]
        if all(amount >= -1e-6 for free in frees for amount in free.values()):
            return True
    return False


@given(bundles, st.integers(1, 4), st.sampled_from(STRATEGIES), machines)
def test_what_is_said_to_fit_can_be_placed_and_nothing_else(
    bundle: dict[str, float], count: int, strategy: str, nodes: list[Node]
) -> None:
    wish = Wish("decode", count, bundle, strategy)
    reason = why_not(wish, nodes, {})
    assert (reason == "") == can_be_placed(wish, nodes)
    assert not reason or all(node.name in reason for node in nodes)


@given(bundles, st.integers(1, 4), st.sampled_from(STRATEGIES), machines)
def test_what_fits_is_booked_within_the_machines(
    bundle: dict[str, float], count: int, strategy: str, nodes: list[Node]
) -> None:
    wish = Wish("decode", count, bundle, strategy)
    held: dict[str, list[dict[str, float]]] = {}
    if not fits(wish, [room(bundle, node.total) for node in nodes]):
        return
    take(wish, nodes, held)  # type: ignore[arg-type]
    booked = [held.get(node.id, []) for node in nodes]
    assert sum(map(len, booked)) == count
    for node, bundles_there in zip(nodes, booked, strict=True):
        assert all(amount >= -1e-6 for amount in free_on(node, bundles_there).values())
        assert strategy != "STRICT_SPREAD" or len(bundles_there) <= 1
    assert strategy != "STRICT_PACK" or sorted(map(len, booked))[-1] == count


def test_the_reason_says_what_each_node_lacks() -> None:
    wish = Wish("decode", 3, {"GPU": 1, "decode": 1, "memory": float(1 << 20)})
    nodes = [Node("a" * 8, "10.0.0.1", {"GPU": 1, "memory": 1e9}), NODE_B]
    assert why_not(wish, nodes, {}) == (
        "decode needs 3 x (GPU 1, decode 1, memory 1 MiB); "
        "node 10.0.0.1-aaaaaa has no decode left; node 10.0.0.2-bbbbbb has no memory left"
    )
    assert why_not(wish, [], {}).endswith("; there are no nodes")
    held = {NODE_A.id: [{"GPU": 1.5}]}
    text = why_not(Wish("prefill", 1, {"GPU": 1}), [NODE_A], held)
    assert text == "prefill needs 1 x (GPU 1); node 10.0.0.1-aaaaaa has 0.5 of 2 GPU left"


def test_thirds_of_a_gpu_make_a_whole() -> None:
    assert room({"GPU": 1 / 3}, {"GPU": 1.0}) == 3


def test_workers_that_may_go_have_room_of_their_own() -> None:
    pool = {"min_replicas": 1, "replicas": 3, "max_replicas": 4}
    found = wishes(config(pools={"prefill": {"replicas": 2}, "decode": pool}))
    assert [(wish.name, wish.count, wish.one_by_one) for wish in found] == [
        ("conductor", 1, False),
        ("prefill", 2, False),
        ("decode", 1, False),
        ("decode", 2, True),
    ]


PATIENCE = Scale(look_s=1, up_after_s=5, down_after_s=20)


@given(st.integers(0, 6), st.lists(st.integers(-1, 9), max_size=120))
def test_a_pool_stays_within_its_bounds_and_follows_in_the_end(
    start: int, wants: list[int]
) -> None:
    scaler, size, now = Scaler(1, 6, PATIENCE), max(start, 1), 0.0
    for want in wants:
        before, size, now = size, scaler.size(size, want, now), now + 1
        assert 1 <= size <= 6
        if size != before:  # towards what is wanted now, and not beyond
            low, high = sorted((before, min(max(want, 1), 6)))
            assert low <= size <= high
    for _ in range(60):
        size, now = scaler.size(size, 4, now), now + 1
    assert size == 4


def test_a_pool_grows_soon_and_shrinks_late() -> None:
    scaler = Scaler(1, 6, PATIENCE)
    assert [scaler.size(2, want, t) for t, want in enumerate([3, 5, 4, 4, 4, 6])] == [2] * 5 + [3]
    assert scaler.size(3, 6, 6.0) == 3
    sizes = [scaler.size(3, 1 if t % 30 else 2, 10.0 + t) for t in range(22)]
    assert sizes == [3] * 20 + [2, 3]


def test_a_moment_of_doubt_starts_the_wait_again() -> None:
    scaler = Scaler(1, 6, PATIENCE)
    wants = [5, 5, 5, 2, 5, 5, 5, 5, 5]
    assert [scaler.size(2, want, t) for t, want in enumerate(wants)] == [2] * 9


def test_what_the_planner_says_is_shared_between_pools() -> None:
    told = planner_says([{}, {"conductors": [{}, {"wanted": {"prefill": 3, "decode": 5}}]}])
    assert told == {"prefill": 3, "decode": 5}
    assert planner_says([{"conductors": [{"name": "conductor-0"}]}]) is None
    pools = {"old": {"role": "decode"}, "decode": {"max_replicas": 9}, "prefill": {}}
    split = config(pools=pools)
    assert wanted_of(split, split.pools["decode"], told, {"old": 2, "decode": 1}) == 3
    both = config(pools={"elastic": {"max_replicas": 9}, "prefill": {}})
    assert wanted_of(both, both.pools["elastic"], told, {"prefill": 1}) == 7


def test_pauses_double_up_to_a_bound() -> None:
    restart = Restart(backoff_s=0.5, max_backoff_s=30)
    assert [pause_s(restart, n) for n in (1, 2, 3, 7, 8, 1000)] == [0.5, 1, 2, 30, 30, 30]
