"""Which worker decodes, and when it computes the prompt itself."""

from __future__ import annotations

from dataclasses import replace

from baton.types.fleet import BlockState, WorkerLoad
from baton.types.kv_events import Tier
from conductor.cost_model import DecodeCost, PrefillCost, TransferCost, WorkerCost
from tests.fake_worker import BLOCK_SIZE
from tests.unit.test_conductor_policies import ask, decode, fetched, prefill, store, transfers


def test_decode_prefers_the_prefix_among_those_that_are_as_busy() -> None:
    workers = [prefill("p0"), decode("d0"), decode("d1", own_attempts=1), decode("d2")]
    assert ask(*workers, held={"d1": 9}).decode.info.name == "d1"
    workers[2] = decode("d1", own_attempts=4)
    assert ask(*workers, held={"d1": 9}).decode.info.name != "d1"


def test_of_those_that_hold_as_much_the_least_busy_one_decodes() -> None:
    workers = [prefill("p0"), decode("d0", own_attempts=1), decode("d1"), decode("d2")]
    for key in map(str, range(8)):  # drawn among the least busy
        least = ask(*workers, key=key).decode.info.name
        assert ask(*workers, key=key, held={"d0": 9, least: 9}).decode.info.name == least


def test_decode_does_not_wait_for_a_slow_worker_that_holds_the_prefix() -> None:
    slow = WorkerCost(PrefillCost(), DecodeCost(0.2, 1e-3, 99))
    workers = (prefill("p0"), decode("d0"), decode("d1", cost=slow))
    assert ask(*workers, held={"d1": 9}).decode.info.name == "d0"


def test_decode_needs_room_for_the_whole_answer() -> None:
    full = WorkerLoad(blocks=((BlockState.ACTIVE, 4090), (BlockState.FREE, 6)))
    cached = WorkerLoad(running=1, blocks=((BlockState.CACHED, 4000), (BlockState.FREE, 96)))
    workers = (prefill("p0"), decode("d0", load=full), decode("d1", load=cached))
    assert ask(*workers).decode.info.name == "d1"
    assert ask(workers[0], workers[1]).decode.info.name == "d0"  # it will wait there


def test_alone_the_holder_is_preferred_unless_it_is_much_busier() -> None:
    busy = WorkerLoad(running=3)
    workers = (decode("d0", load=WorkerLoad(running=2)), decode("d1", load=busy))
    assert ask(*workers, held={"d1": 9}).decode.info.name == "d1"
    busier = decode("d1", load=WorkerLoad(running=9))
    decision = ask(workers[0], busier, held={"d1": 9})
    assert decision.decode.info.name == "d0"
    assert fetched(decision) == [("d1", 0, 9, Tier.GPU)]
    assert decision.prefill is None


# -- conditional disaggregation -------------------------------------------------------------------


def test_a_short_suffix_skips_the_hop() -> None:
    workers = (prefill("p0"), decode())
    assert ask(*workers, held={"d0": 9}, local=0).prefill is not None
    near = ask(*workers, held={"d0": 9}, local=24)
    assert (near.prefill, near.reason) == (None, "local")
    assert "too few for a hop" in near.reasons[-1]
    assert ask(*workers, held={"d0": 9}, local=23).prefill is not None


def test_the_costs_decide_when_they_are_known() -> None:
    workers = (prefill("p0"), decode())
    suffix_s = (BLOCK_SIZE + 8) * 1e-3
    slow, fast = (TransferCost(share * suffix_s, 0.0, 99) for share in (1.1, 0.9))
    held = {"d0": 9}
    assert ask(*workers, held=held, local=None, costs=transfers(handoff=slow)).prefill is None
    assert ask(*workers, held=held, local=None, costs=transfers(handoff=fast)).prefill is not None
    busy = (workers[0], decode(own_attempts=1))  # which would be held back as well
    assert ask(*busy, held=held, local=None, costs=transfers(handoff=slow)).prefill is not None
    guessed = replace(slow, samples=0)
    assert ask(*workers, held=held, local=None, costs=transfers(handoff=guessed)).prefill
    unknown = decode(cost=WorkerCost())
    assert ask(workers[0], unknown, held=held, local=None, costs=transfers(handoff=slow)).prefill


def test_what_can_be_fetched_shortens_the_suffix() -> None:
    workers = (prefill("p0"), decode(node="a"), store("store-a", node="a"))
    decision = ask(*workers, held={"store-a": 10}, local=8)
    assert decision.prefill is None
    assert fetched(decision) == [("store-a", 0, 10, Tier.GPU)]
