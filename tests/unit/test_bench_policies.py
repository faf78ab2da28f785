"""What the policies are worth, in a modelled cluster: the same figures on every machine."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from baton.bench.sessions import Shape, make_sessions
from conductor.bench_cluster import BLOCK, COST, ModelledCluster, Result
from conductor.bench_policies import COMPARED, simulate

SHAPE = Shape(256, 16, 8000, shared_prefix=1024, spread=0.5, groups=4, turns=6)


@cache
def result(name: str, pairs: int = 2) -> Result:
    return simulate(pairs, 0.5, COMPARED[name], 0, SHAPE)


def test_cache_aware_routing_halves_ttft_and_finds_nearly_all_there_is() -> None:
    """The aim of a 2P2D cluster under conversations, next to workers that use what they have."""
    best = result("cache-aware")
    assert best.cached_of_ideal >= 0.95
    assert best.mean_ttft_s <= 0.5 * result("random+local").mean_ttft_s
    assert result("random+local").cached_of_ideal < 0.95


@pytest.mark.parametrize("other", [name for name in COMPARED if name != "cache-aware"])
@pytest.mark.parametrize("pairs", [2, 4])
def test_no_other_policy_is_much_faster(other: str, pairs: int) -> None:
    assert result("cache-aware", pairs).mean_ttft_s <= 1.05 * result(other, pairs).mean_ttft_s


def test_fetching_is_what_makes_random_find_as_much() -> None:
    assert result("random").cached_of_ideal > 0.95
    assert result("random").mean_ttft_s < result("random+local").mean_ttft_s


def test_a_burst_that_shares_a_prefix_computes_it_once() -> None:
    shape = replace(SHAPE, shared_prefix=4096, groups=1, turns=1, spread=0.0)
    sessions = make_sessions(shape, 8)
    cluster = ModelledCluster(2, 2, COMPARED["cache-aware"])
    run = cluster.run(sessions, rate_per_s=2.0, seed=0)  # eight prompts while the first is computed
    assert run.cached_of_ideal == 1.0
    assert COST.prefill.seconds(4096) > 2.0


def test_a_prompt_alone_takes_what_the_model_says() -> None:
    shape = Shape(10 * BLOCK + 5, 4, 100)
    run = ModelledCluster(1, 1, COMPARED["cache-aware"]).run(make_sessions(shape, 1), 1.0, 0)
    assert run.ttft_s == pytest.approx([COST.prefill.seconds(10 * BLOCK + 5)])
    assert run.computed == {"prefill-0": 10 * BLOCK + 5}
    assert run.ideal_tokens == 0
