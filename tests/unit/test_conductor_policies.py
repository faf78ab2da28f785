"""Policies as pure functions: who computes a prompt, who decodes, what is fetched from whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types.fleet import Role, WorkerLoad, WorkerState
from baton.types.kv_events import KvSnapshot, Tier
from conductor.backlog import Ahead, Backlog
from conductor.cost_model import (
    DecodeCost,
    PrefillCost,
    TransferCost,
    TransferCosts,
    WorkerCost,
)
from conductor.estimate import DUE_S, Fetch
from conductor.policies import RoutePolicy
from conductor.prefix_map import PrefixMap
from conductor.ring import Ring
from conductor.router import Decision, RouteOptions, RouteRequest, route
from conductor.views import FleetView, WorkerView
from tests.fake_worker import BLOCK_SIZE, layout, worker_info

BYTES = layout().block_bytes
MEASURED = WorkerCost(PrefillCost(0.0, 1e-3, 0.0, 99), DecodeCost(0.02, 1e-3, 99))
BLOCK_S = 1e-3 * BLOCK_SIZE  # to compute a block
CHAIN = Random(0).randbytes(16 * 1000)  # keys of a prompt's blocks
ROOM = {"num_blocks": 4096, "max_model_len": 65536}


def bandwidth(blocks_per_s: float, latency_s: float = 0.0) -> TransferCost:
    return TransferCost(latency_s, 1 / (blocks_per_s * BYTES), 99)


def transfers(**changes: TransferCost) -> TransferCosts:
    """Ten times as fast as computing, a local store four times as fast again."""
    routes = {route: bandwidth(10 / BLOCK_S) for route in TransferCosts().routes}
    for path in routes:
        if path.local:
            routes[path] = bandwidth(40 / BLOCK_S)
        if path.tier.value in changes and not path.local:
            routes[path] = changes[path.tier.value]
    return TransferCosts(routes, changes.get("handoff", TransferCost(0.05, 0.0, 99)))


def worker(
    name: str,
    role: Role = Role.PREFILL,
    queue_s: float = 0.0,
    load: WorkerLoad | None = None,
    state: WorkerState = WorkerState.LIVE,
    cost: WorkerCost = MEASURED,
    own_attempts: int = 0,
    **info: object,
) -> WorkerView:
    backlog = (
        Backlog(round(queue_s * 1000), queue_s, (Ahead((0, 0.0), queue_s),))
        if queue_s
        else Backlog()
    )
    return WorkerView(
        worker_info(name, role, **(ROOM | info)),
        state,
        load or WorkerLoad(),
        own_attempts,
        backlog,
        cost,
    )


def prefill(name: str, queue_s: float = 0.0, **values: object) -> WorkerView:
    return worker(name, Role.PREFILL, queue_s, **values)  # type: ignore[arg-type]


def decode(name: str = "d0", **values: object) -> WorkerView:
    return worker(name, Role.DECODE, **values)  # type: ignore[arg-type]


def store(name: str, **values: object) -> WorkerView:
    return worker(name, Role.STORE, max_model_len=0, **values)  # type: ignore[arg-type]


def ask(
    *workers: WorkerView,
    blocks: int = 10,
    tail: int = 8,
    held: dict[str, int] | None = None,
    tiers: dict[str, Tier] | None = None,
    policy: RoutePolicy = RoutePolicy.CACHE_AWARE,
    local: int | None = 0,
    costs: TransferCosts | None = None,
    group: bytes = b"",
    ring: bool = True,
    fetch: Fetch = Fetch.CLUSTER,
    patience: float = 0.0,
    **request: object,
) -> Decision:
    """Route a prompt of `blocks` full blocks and a tail, of which `held` says who has how much."""
    known = PrefixMap(1000)
    for name, count in (held or {}).items():
        tier = (tiers or {}).get(name, Tier.GPU)
        known.apply(name, KvSnapshot(0, tier, CHAIN[: 16 * count], first=True, last=True))
    names = [w.info.name for w in workers if w.info.role is Role.PREFILL]
    fleet = FleetView(workers, Ring.of(names) if ring and names else None, costs or transfers())
    wanted = RouteRequest(
        key=str(request.pop("key", "r")),
        prompt=tuple(range(blocks * BLOCK_SIZE + tail)),
        max_tokens=10,
        keys=group,
        matches=known.matches(CHAIN),
        **request,  # type: ignore[arg-type]
    )
    return route(wanted, fleet, 0.0, RouteOptions(policy, local, fetch, patience))


def chosen(decision: Decision) -> str:
    assert decision.prefill is not None
    return decision.prefill.info.name


def fetched(decision: Decision) -> list[tuple[str, int, int, Tier]]:
    return [
        (part.source.name, part.first_block, part.num_blocks, part.tier)
        for part in decision.fetch_plan
    ]


def group_owned_by(name: str, names: list[str]) -> bytes:
    ring = Ring.of(names)
    groups = (number.to_bytes(16, "little") for number in range(1000))
    return next(group for group in groups if ring.owners(group, 1)[0] == name)


# -- Algorithm 1 ----------------------------------------------------------------------------------


def test_the_holder_of_the_prefix_computes_the_rest() -> None:
    decision = ask(prefill("p0"), prefill("p1"), prefill("p2"), decode(), held={"p1": 8})
    assert chosen(decision) == "p1"
    assert decision.reason == "cached"
    assert decision.fetch_plan == ()
    assert decision.ttft_s == pytest.approx((2 * BLOCK_SIZE + 8) * 1e-3)


def test_a_queue_at_the_holder_makes_another_worker_fetch_the_prefix() -> None:
    decision = ask(prefill("p0", 1.0), prefill("p1"), decode(), held={"p0": 8})
    assert chosen(decision) == "p1"
    assert decision.reason == "fetch"
    assert fetched(decision) == [("p0", 0, 8, Tier.GPU)]
    assert decision.ttft_s == pytest.approx(8 * BLOCK_S / 10 + (2 * BLOCK_SIZE + 8) * 1e-3)
    assert any("fetch blocks 0 to 7 from p0" in reason for reason in decision.reasons)


def test_a_longer_match_elsewhere_is_fetched_on_top_of_the_own_one() -> None:
    decision = ask(prefill("p0", 1.0), prefill("p1"), decode(), held={"p0": 10, "p1": 2})
    assert chosen(decision) == "p1"
    assert fetched(decision) == [("p0", 2, 8, Tier.GPU)]


def test_a_slightly_longer_match_is_not_worth_a_transfer() -> None:
    near = {"p0": 41, "p1": 40}
    decision = ask(prefill("p0", 1.0), prefill("p1"), decode(), blocks=60, held=near)
    assert chosen(decision) == "p1"
    assert decision.fetch_plan == ()  # below the balancing threshold


def test_a_fetch_that_cannot_beat_computing_is_not_planned() -> None:
    slow = transfers(nvme=bandwidth(0.9 / BLOCK_S), gpu=bandwidth(0.9 / BLOCK_S))
    for tier in (Tier.NVME, Tier.GPU):
        tiers = {"p0": tier}
        decision = ask(
            prefill("p0", 9.0), prefill("p1"), decode(), held={"p0": 8}, tiers=tiers, costs=slow
        )
        assert (chosen(decision), decision.fetch_plan) == ("p1", ())


def test_latency_counts_too() -> None:
    far = transfers(gpu=bandwidth(10 / BLOCK_S, latency_s=1.0))
    short = ask(prefill("p0", 9.0), prefill("p1"), decode(), held={"p0": 8}, costs=far)
    assert short.fetch_plan == ()
    long = ask(
        prefill("p0", 99.0), prefill("p1"), decode(), blocks=1000, held={"p0": 990}, costs=far
    )
    assert len(long.fetch_plan) == 1


def test_stores_are_sources_and_the_near_one_comes_first() -> None:
    workers = (
        prefill("p0", node="a"),
        decode(),
        store("store-a", node="a"),
        store("store-b", node="b"),
    )
    tiers = {"store-a": Tier.CPU, "store-b": Tier.NVME}
    decision = ask(*workers, held={"store-a": 6, "store-b": 9}, tiers=tiers)
    assert fetched(decision) == [("store-a", 0, 6, Tier.CPU), ("store-b", 6, 3, Tier.NVME)]
    same = ask(*workers, held={"store-a": 9, "store-b": 9}, tiers=tiers)
    assert fetched(same) == [("store-a", 0, 9, Tier.CPU)]


def test_nothing_is_fetched_from_those_that_are_not_live() -> None:
    dead = prefill("p0", state=WorkerState.DEAD)
    decision = ask(dead, prefill("p1"), decode(), held={"p0": 8, "never-heard-of": 9})
    assert (chosen(decision), decision.fetch_plan) == ("p1", ())


def test_nothing_is_fetched_from_a_worker_that_has_just_failed_the_request() -> None:
    workers = (prefill("p0"), prefill("p1"), decode())
    decision = ask(*workers, held={"p0": 8}, avoid=frozenset({"p0"}))
    assert (chosen(decision), decision.fetch_plan) == ("p1", ())


def test_the_last_token_is_always_computed() -> None:
    decision = ask(prefill("p0"), decode(), tail=0, held={"p0": 10})
    assert decision.chosen is not None
    assert decision.chosen.cached_tokens == 9 * BLOCK_SIZE


def test_a_prefix_that_is_being_computed_is_worth_waiting_for() -> None:
    """A second prompt of a burst waits for the first one's blocks, rather than compute them too;
    no other worker plans to fetch what is not there yet."""
    workers = (prefill("p0", 8 * BLOCK_S), prefill("p1"), decode())
    decision = ask(*workers, blocks=12, computing={"p0": 8})
    assert chosen(decision) == "p0"
    assert decision.chosen.expected_tokens == decision.chosen.cached_tokens == 8 * BLOCK_SIZE
    assert "128 of them by then" in decision.chosen.describe()
    other = next(c for c in decision.candidates if c.worker == "p1")
    assert (other.fetch_tokens, other.cached_tokens) == (0, 0)
    assert chosen(ask(*workers, blocks=12)) == "p1"


def test_a_prefix_behind_a_long_queue_is_computed_again() -> None:
    workers = (prefill("p0", 20 * BLOCK_S), prefill("p1"), decode())
    assert chosen(ask(*workers, blocks=12, computing={"p0": 8})) == "p1"


def test_what_is_expected_adds_to_what_is_there() -> None:
    workers = (prefill("p0"), prefill("p1"), decode())
    decision = ask(*workers, held={"p0": 4, "p1": 6}, computing={"p0": 9, "gone": 10, "p1": 3})
    (p0,) = [c for c in decision.candidates if c.worker == "p0"]
    assert (p0.cached_tokens, p0.expected_tokens) == (9 * BLOCK_SIZE, 5 * BLOCK_SIZE)
    (p1,) = [c for c in decision.candidates if c.worker == "p1"]
    assert (p1.cached_tokens, p1.expected_tokens) == (6 * BLOCK_SIZE, 0)
    assert chosen(decision) == "p0"


def test_requests_of_a_group_go_to_its_owner_while_it_is_idle() -> None:
    names = ["p0", "p1", "p2"]
    for name in names:
        group = group_owned_by(name, names)
        idle = [prefill(other) for other in names]
        decision = ask(*idle, decode(), group=group)
        assert (chosen(decision), decision.reason) == (name, "owner")
        busy = [prefill(other, 5.0 if other == name else 0.0) for other in names]
        second = Ring.of(names).owners(group, 2)[1]
        assert chosen(ask(*busy, decode(), group=group)) == second


def test_a_busy_group_spreads_by_load() -> None:
    names = ["p0", "p1", "p2"]
    group = group_owned_by("p0", names)
    owners = Ring.of(names).owners(group, 2)
    workers = [prefill(name, 5.0 if name in owners else 0.0) for name in names]
    decision = ask(*workers, decode(), group=group)
    assert chosen(decision) not in owners
    assert decision.reason == "least-loaded"


def test_more_urgent_requests_do_not_see_the_queue_of_others() -> None:
    patient = replace(prefill("p0"), backlog=Backlog(1000, 1.0, (Ahead((5, 0.0), 1.0),)))
    held = {"p0": 8}
    assert (
        chosen(ask(patient, prefill("p1"), decode(), held=held, priority=5, fetch=Fetch.NOBODY))
        == "p1"
    )
    assert (
        chosen(ask(patient, prefill("p1"), decode(), held=held, priority=0, fetch=Fetch.NOBODY))
        == "p0"
    )


@pytest.mark.parametrize("queue_s", [0.0, DUE_S - 1.5, DUE_S + 5.0])
def test_others_overtake_a_prompt_only_as_far_as_it_is_still_done_in_time(queue_s: float) -> None:
    decision = ask(prefill("p0", queue_s), decode(), patience=100.0)
    chosen = decision.candidates[0]
    assert chosen.slack_s == pytest.approx(
        max(min(100.0 * chosen.prefill_s, DUE_S - queue_s - chosen.prefill_s), 0.0)
    )
    assert (chosen.slack_s > 0) == (queue_s < DUE_S)
    assert ask(prefill("p0", queue_s), decode()).candidates[0].slack_s == 0.0


def test_prompts_that_only_a_report_tells_of_count_as_queue() -> None:
    told = WorkerLoad(waiting=2, waiting_tokens=3000)
    decision = ask(prefill("p0", load=told), prefill("p1", 1.0), decode())
    assert chosen(decision) == "p1"


def test_candidates_tell_what_was_compared() -> None:
    decision = ask(
        prefill("p0", 0.5), prefill("p1"), prefill("p2"), decode(), held={"p0": 8, "p2": 1}
    )
    by_name = {candidate.worker: candidate for candidate in decision.candidates}
    assert decision.chosen in decision.candidates
    assert by_name["p0"].why == "holder"
    assert by_name["p0"].queue_s == 0.5
    assert by_name["p0"].cached_tokens == 8 * BLOCK_SIZE
    assert min(c.ttft_s for c in decision.candidates) == pytest.approx(decision.ttft_s, rel=0.1)
    assert "fetch" in decision.reasons[1]


@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(0, 40)), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, BLOCK_SIZE),
)
def test_the_choice_is_never_much_slower_than_any_candidate(
    workers: list[tuple[float, int]], blocks: int, tail: int
) -> None:
    views = [prefill(f"p{i}", queue_s) for i, (queue_s, _) in enumerate(workers)]
    held = {f"p{i}": min(count, blocks) for i, (_, count) in enumerate(workers) if count}
    decision = ask(*views, decode(), blocks=blocks, tail=tail, held=held)
    least = min(candidate.ttft_s for candidate in decision.candidates)
    assert least <= decision.ttft_s <= least * 1.05 + 1e-3
    plan = decision.fetch_plan
    assert decision.chosen is not None
    reached = decision.chosen.cached_tokens // BLOCK_SIZE
    for part in plan:  # a plan has no gap, and nobody fetches from itself
        assert part.first_block == reached
        assert part.source.name != chosen(decision)
        assert part.num_blocks <= held[part.source.name] - part.first_block
        reached += part.num_blocks
    assert reached * BLOCK_SIZE < blocks * BLOCK_SIZE + tail


# -- policies -------------------------------------------------------------------------------------

ALL = list(RoutePolicy)


@pytest.mark.parametrize("policy", ALL)
def test_every_policy_is_a_function_of_the_request(policy: RoutePolicy) -> None:
    workers = [prefill(f"p{i}", i / 10) for i in range(4)] + [decode(f"d{i}") for i in range(3)]
    options = {"policy": policy, "group": bytes(16), "number": 5, "held": {"p2": 3}}
    first = ask(*workers, **options)  # type: ignore[arg-type]
    again = ask(*workers[::-1], **options)  # type: ignore[arg-type]
    assert (first.prefill, first.decode) == (again.prefill, again.decode)
    assert first.reasons


def test_random_spreads() -> None:
    workers = [prefill(f"p{i}", i) for i in range(4)] + [decode("d0"), decode("d1")]
    decisions = [ask(*workers, policy=RoutePolicy.RANDOM, key=str(n)) for n in range(400)]
    assert min(Counter(chosen(decision) for decision in decisions).values()) > 60
    pairs = Counter((chosen(d), d.decode.info.name) for d in decisions)
    assert len(pairs) == 8


def test_round_robin_takes_turns() -> None:
    workers = [prefill(f"p{i}", i) for i in range(3)] + [decode()]
    order = [chosen(ask(*workers, policy=RoutePolicy.ROUND_ROBIN, number=n)) for n in range(6)]
    assert order == ["p0", "p1", "p2"] * 2


def test_consistent_hash_keeps_a_group_together_within_the_bound() -> None:
    names = [f"p{i}" for i in range(4)]
    group = group_owned_by("p2", names)
    options = {"policy": RoutePolicy.CONSISTENT_HASH, "group": group}
    even = [prefill(name, 1.0) for name in names]
    assert chosen(ask(*even, decode(), **options)) == "p2"  # type: ignore[arg-type]
    uneven = [
        prefill(name, 9.0 if name == "p2" else 1.0, own_attempts=9 if name == "p2" else 1)
        for name in names
    ]
    assert chosen(ask(*uneven, decode(), **options)) != "p2"  # type: ignore[arg-type]
    short = ask(*uneven, decode(), policy=RoutePolicy.CONSISTENT_HASH)
    assert chosen(short) in {"p0", "p1", "p3"}  # without a group, the least loaded


def test_other_policies_fetch_as_well() -> None:
    workers = (prefill("p0", 1.0), prefill("p1"), decode())
    decision = ask(*workers, policy=RoutePolicy.LEAST_LOADED, held={"p0": 8})
    assert chosen(decision) == "p1"
    assert len(decision.fetch_plan) == 1


@pytest.mark.parametrize("policy", ALL)
def test_without_fetching_a_worker_computes_what_it_lacks(policy: RoutePolicy) -> None:
    held = {"p0": 10, "s0": 10}
    busy = prefill("p0", 50.0, state=WorkerState.DRAINING)
    workers = (busy, prefill("p1"), store("s0"), decode())
    assert ask(*workers, held=held, policy=policy).fetch_plan
    decision = ask(*workers, held=held, policy=policy, fetch=Fetch.NOBODY)
    assert decision.fetch_plan == ()
    assert decision.chosen.prefill_s == MEASURED.prefill.seconds(10 * BLOCK_SIZE + 8)


def test_without_fetching_the_holder_is_worth_waiting_for() -> None:
    workers = (prefill("p0", 2 * BLOCK_S), prefill("p1"), decode())
    decision = ask(*workers, held={"p0": 8}, fetch=Fetch.NOBODY)
    assert chosen(decision) == "p0"
    assert decision.chosen.cached_tokens == 8 * BLOCK_SIZE


def test_within_the_node_only_the_store_beside_a_worker_helps_it() -> None:
    workers = (
        prefill("p0", 2 * BLOCK_S, node="a"),
        prefill("p1", node="b"),
        store("store-a", node="a"),
        decode(),
    )
    tiers = {"store-a": Tier.CPU}
    everywhere = ask(*workers, held={"store-a": 8}, tiers=tiers)
    assert (chosen(everywhere), len(everywhere.fetch_plan)) == ("p1", 1)
    node = ask(*workers, held={"store-a": 8}, tiers=tiers, fetch=Fetch.NODE)
    assert (chosen(node), fetched(node)) == ("p0", [("store-a", 0, 8, Tier.CPU)])
    assert node.reason == "fetch"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=5), st.integers(0, 99))
def test_cache_aware_is_least_loaded_when_nothing_is_known(
    queues: list[float], number: int
) -> None:
    workers = [prefill(f"p{i}", queue_s) for i, queue_s in enumerate(queues)] + [decode()]
    aware, least = (
        ask(*workers, policy=policy, key=str(number), ring=False)
        for policy in (RoutePolicy.CACHE_AWARE, RoutePolicy.LEAST_LOADED)
    )
    assert (aware.prefill, aware.decode) == (least.prefill, least.decode)
