"""Policies next to one another in a modelled cluster under load: TTFT, hit rate, balance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from baton.bench.ideal import InfiniteCache
from baton.bench.sessions import Session, Shape, make_sessions
from conductor.bench_cluster import BLOCK, COST, ModelledCluster, Result
from conductor.bench_figures import Figure, Plan
from conductor.estimate import Fetch
from conductor.policies import RoutePolicy
from conductor.router import RouteOptions

PART = "policies"
PAIRS = (2, 8)  # prefill and decode workers, of each so many
SESSIONS_PER_PAIR = 8
BUSY = (0.3, 0.5)  # of the time, that prefill workers compute if nothing is computed twice
SHAPE = Shape(512, 16, 8000, shared_prefix=4096, spread=0.5, groups=4, turns=8)
COMPARED = {
    "random+local": RouteOptions(RoutePolicy.RANDOM, 0, fetch=Fetch.NOBODY),
    "least-loaded+local": RouteOptions(RoutePolicy.LEAST_LOADED, 0, fetch=Fetch.NOBODY),
    "random": RouteOptions(RoutePolicy.RANDOM, 0),
    "least-loaded": RouteOptions(RoutePolicy.LEAST_LOADED, 0),
    "consistent-hash": RouteOptions(RoutePolicy.CONSISTENT_HASH, 0),
    "cache-aware+local": RouteOptions(RoutePolicy.CACHE_AWARE, 0, fetch=Fetch.NOBODY),
    "cache-aware": RouteOptions(RoutePolicy.CACHE_AWARE, 0),
}


def measure_policies(plan: Plan) -> Iterator[Figure]:
    """Conversations behind long shared prefixes, as many per worker in a small and a larger
    cluster; `+local`: nobody fetches."""
    for pairs, busy in product(PAIRS, BUSY):
        results = {
            name: simulate(pairs, busy, options, plan.seed) for name, options in COMPARED.items()
        }
        base_s = results["random+local"].mean_ttft_s
        for name, result in results.items():
            title = f"{pairs}P{pairs}D {busy:.0%} busy, {name}"
            said = f"{result.mean_ttft_s / base_s:.2f} of random+local"
            yield Figure(PART, f"{title}: mean TTFT", result.mean_ttft_s * 1e3, "ms", said)
            share, said = 100 * result.cached_of_ideal, f"load max / mean {result.balance:.2f}"
            yield Figure(PART, f"{title}: hits of the ideal", share, "%", said)


def simulate(
    pairs: int, busy: float, options: RouteOptions, seed: int, shape: Shape = SHAPE
) -> Result:
    """The same load for all options."""
    sessions = make_sessions(shape, SESSIONS_PER_PAIR * pairs * shape.turns)
    rate = busy * pairs * len(sessions) / _least_work_s(sessions)
    return ModelledCluster(pairs, pairs, options).run(sessions, rate, seed)


def _least_work_s(sessions: list[Session]) -> float:
    """Seconds to compute every block of the prompts once."""
    cache, seconds = InfiniteCache(BLOCK), 0.0
    for session in sessions:
        said: list[int] = []
        for turn in session.turns:
            said += turn.tokens
            found = cache.expect(said)
            seconds += COST.prefill.seconds(len(said) - found, found)
            said += [0] * turn.max_tokens  # stands for the answer
    return seconds
