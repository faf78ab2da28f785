"""A prefix that many hold is decided on as one that few hold: by columns instead of one by one."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import NoWorker
from baton.types.fleet import Role, WorkerLoad, WorkerState
from baton.types.kv_events import KvSnapshot, Tier
from conductor import estimate, matches
from conductor.backlog import Ahead, Backlog
from conductor.cost_model import DecodeCost, PrefillCost, WorkerCost
from conductor.estimate import Fetch, find_prefix
from conductor.policies import RoutePolicy
from conductor.prefix_map import PrefixMap
from conductor.ring import Ring
from conductor.router import Decision, RouteOptions, RouteRequest, route
from conductor.views import FleetView, WorkerView
from tests.fake_worker import BLOCK_SIZE, layout, worker_info

BLOCKS = 12
CHAIN = Random(1).randbytes(16 * BLOCKS)
COST = WorkerCost(PrefillCost(0.0, 1e-3, 0.0, 99), DecodeCost(0.02, 1e-3, 99))
few = st.integers(0, 2)  # so that many are alike


@st.composite
def fleets(draw: st.DrawFn) -> FleetView:
    workers = []
    for number in range(draw(st.integers(2, 9))):
        queue_s = 0.1 * draw(few)
        info = worker_info(
            f"w{97 * (number + 5) % 100}",  # names in another order than workers
            draw(st.sampled_from([Role.PREFILL, Role.DECODE, Role.DECODE, Role.STORE])),
            num_blocks=1000,
            max_model_len=65536,
            node=draw(st.sampled_from(["", "a", "b"])),
        )
        workers.append(
            WorkerView(
                info,
                draw(st.sampled_from([*[WorkerState.LIVE] * 5, WorkerState.SUSPECT])),
                WorkerLoad(running=draw(few)),
                backlog=Backlog(50, queue_s, (Ahead((0, 0.0), queue_s),)) if queue_s else Backlog(),
                cost=COST,
            )
        )
    prefill = [worker.info.name for worker in workers if worker.info.role is Role.PREFILL]
    return FleetView(tuple(workers), Ring.of(prefill) if prefill else None)


@st.composite
def maps(draw: st.DrawFn, fleet: FleetView) -> PrefixMap:
    """Holders that came in any order, some of whom nobody knows any more."""
    known = PrefixMap(1000)
    names = [worker.info.name for worker in fleet.workers]
    for name in draw(st.permutations([*names, "gone"])):
        for part in range(draw(few)):
            held = CHAIN[: 16 * draw(st.sampled_from([1, 4, 4, BLOCKS]))]
            tier = draw(st.sampled_from(Tier))
            known.apply(name, KvSnapshot(part, tier, held, first=part == 0, last=True))
    for name in draw(st.sets(st.sampled_from(names))):
        known.drop(name)
    return known


def decisions(known: PrefixMap, fleet: FleetView, **asked: object) -> Iterator[Decision | str]:
    found = known.matches(CHAIN)
    for number, policy in enumerate(RoutePolicy):
        for fetch in Fetch:
            request = RouteRequest(
                f"r{number}",
                tuple(range(BLOCKS * BLOCK_SIZE)),
                10,
                number=number,
                keys=CHAIN,
                matches=found,
                **asked,  # type: ignore[arg-type]
            )
            try:
                yield route(request, fleet, 0.05, RouteOptions(policy, 0, fetch))
            except NoWorker as error:
                yield error.message


@given(st.data(), fleets())
def test_a_crowd_is_decided_on_as_a_few(data: st.DataObject, fleet: FleetView) -> None:
    known = data.draw(maps(fleet))
    names = [worker.info.name for worker in fleet.workers]
    sources = data.draw(st.sampled_from([1, 3, 8]))
    asked = {
        "avoid": frozenset(data.draw(st.sets(st.sampled_from(names), max_size=2))),
        "computing": data.draw(st.dictionaries(st.sampled_from(names), st.integers(1, BLOCKS))),
    }
    with patch.object(estimate, "MAX_SOURCES", sources):
        as_few = list(decisions(known, fleet, **asked))
        with patch.object(matches, "_CROWD_BITS", -1):
            assert list(decisions(known, fleet, **asked)) == as_few


@pytest.mark.parametrize("tokens", [1, BLOCK_SIZE])
def test_of_a_prompt_of_one_block_at_most_nothing_can_be_used(tokens: int) -> None:
    """Somebody has to compute its last token."""
    known = PrefixMap(100)
    known.apply("p0", KvSnapshot(0, Tier.GPU, CHAIN, first=True, last=True))
    found = find_prefix(tokens, layout(), known.matches(CHAIN), FleetView(()))
    assert not found.own
    assert not found.sources
