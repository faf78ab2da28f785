"""How a worker is chosen among those that have room: one pure function per policy.

    random, round-robin    for comparison: by the request's key or number alone
    least-loaded           the shortest queue (prefill), the fewest sequences (decode)
    consistent-hash        the owner of the prompt's prefix group, with bounded loads
    cache-aware            the smallest predicted TTFT, after Mooncake's Algorithm 1 (FAST'25),
                           and as little as can be for the prompts that it overtakes

For a decode worker that gets the KV from a prefill worker, the last three differ only in that
cache-aware prefers one which holds the prefix, among those that are about as busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from baton.types.fleet import Role
from baton.types.link import FetchPart
from conductor.estimate import Arrival, Candidate, Prefix, Source, estimate
from conductor.views import Column, FleetView, Pool, WorkerView

OWNERS = 2  # of a prefix group: a hot one has two workers before it spreads by load
MAX_HOLDERS = 4  # longest matches that are considered
LOAD_BOUND = 1.25  # of the average load, which a consistent-hash owner may carry
TIE_SHARE = 0.05  # estimates that are closer than this, or than TIE_S, are equal
TIE_S = 1e-3
CLOSE_SEQUENCES = 1  # more than the least loaded decode worker's, for the prefix's sake
CLOSE_TPOT_SHARE = 1.1  # of the best predicted TPOT: within this, the load decides


class RoutePolicy(StrEnum):
    RANDOM = "random"
    ROUND_ROBIN = "round-robin"
    LEAST_LOADED = "least-loaded"
    CONSISTENT_HASH = "consistent-hash"
    CACHE_AWARE = "cache-aware"


@dataclass(frozen=True, slots=True)
class Choice:
    """Who computes the prompt. The chosen one is among the candidates; `reason` is a metric's
    label."""

    worker: WorkerView
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    fetch: tuple[FetchPart, ...]
    reason: str


class Question(NamedTuple):
    """What policies may look at. `group` is empty for a prompt without a full block."""

    key: str
    number: int
    group: bytes
    arrival: Arrival
    prefix: Prefix
    fleet: FleetView


def choose_prefill(policy: RoutePolicy, workers: Pool, question: Question) -> Choice:
    """Who computes the prompt, among `workers`, of which there is at least one."""
    if policy is RoutePolicy.CACHE_AWARE:
        return _by_ttft(workers, question)
    if policy is RoutePolicy.CONSISTENT_HASH and (owner := _bounded_owner(workers, question)):
        return _just(owner, "owner", question)
    if policy is RoutePolicy.RANDOM:
        return _just(workers.drawn(f"{question.key}/prefill"), "random", question)
    if policy is RoutePolicy.ROUND_ROBIN:
        return _just(workers.in_turn(question.number), "round-robin", question)
    return _just(least_queued(workers, question), "least-loaded", question)


def choose_decode(
    policy: RoutePolicy, workers: Pool, blocks: int, question: Question
) -> WorkerView:
    """Who decodes, among `workers` (at least one); `blocks` is what the sequence may need."""
    if policy is RoutePolicy.RANDOM:
        return workers.drawn(f"{question.key}/decode")
    if policy is RoutePolicy.ROUND_ROBIN:
        return workers.in_turn(question.number)
    roomy = _roomy(workers, blocks)
    if policy is not RoutePolicy.CACHE_AWARE:
        return _least_busy(roomy, question.key)
    fast = _about_as_fast(roomy)
    least = _least_busy(fast, question.key)
    return _close_holder(least, fast, question.prefix) if question.prefix.own else least


def choose_alone(policy: RoutePolicy, workers: Pool, blocks: int, question: Question) -> Choice:
    """Who computes the prompt and decodes, too."""
    if policy not in (RoutePolicy.LEAST_LOADED, RoutePolicy.CACHE_AWARE):
        return choose_prefill(policy, workers, question)
    roomy = _roomy(workers, blocks)
    if policy is RoutePolicy.LEAST_LOADED:
        return _just(_least_busy(roomy, question.key), "least-loaded", question)
    least = _least_busy(_about_as_fast(roomy), question.key)
    most = least.sequences + max(CLOSE_SEQUENCES, least.sequences // 4)
    holds = question.prefix.own.within(roomy) > 0
    close = roomy.column(Column.SEQUENCES) <= most
    as_idle = roomy.column(Column.DECODE_LOAD) <= least.decode_load
    return _by_ttft(roomy.where(as_idle | (holds & close)), question)


def least_queued(workers: Pool, question: Question) -> WorkerView:
    """The one that could begin first; of several, the one with the least to compute."""
    free_at = workers.column(Column.FREE_AT)
    tied = workers.where(free_at <= max(free_at.min(), question.arrival.now))
    return tied.least(Column.QUEUED_TOKENS).drawn(question.key)


def _by_ttft(workers: Pool, question: Question) -> Choice:
    """Algorithm 1 on those that can win: owners of the group, holders, and the least loaded. What
    the prompt takes counts again for each one that it overtakes."""
    prefix, transfers = question.prefix, question.fleet.transfers
    plans = [
        (worker, *estimate(worker, prefix, transfers, question.arrival, why))
        for worker, why in _consider(workers, question).values()
    ]
    best = min([candidate.cost_s for _, candidate, _ in plans])
    limit = best + max(TIE_S, TIE_SHARE * best)
    # Equal estimates: whoever has the prefix, then the owner, who comes first of the rest.
    tied = [plan for plan in plans if plan[1].cost_s <= limit]
    worker, chosen, fetch = max(tied, key=lambda plan: plan[1].cached_tokens)
    reason = "fetch" if fetch else "cached" if chosen.cached_tokens else chosen.why
    return Choice(worker, chosen, tuple([candidate for _, candidate, _ in plans]), fetch, reason)


def _consider(workers: Pool, question: Question) -> dict[str, tuple[WorkerView, str]]:
    """By name, owners first: with equal estimates the first one is taken."""
    considered: dict[str, tuple[WorkerView, str]] = {}
    least = least_queued(workers, question)
    if question.group or question.prefix.own:
        for owner in _owners(workers, question):
            # An owner that works while another worker is idle would only gather a queue.
            if owner.free_at <= max(least.free_at, question.arrival.now):
                considered[owner.info.name] = (owner, "owner")
                break
        for holder in question.prefix.longest(workers, MAX_HOLDERS):
            considered.setdefault(holder.info.name, (holder, "holder"))
        for worker in _beside_stores(workers, question.prefix.sources):
            considered.setdefault(worker.info.name, (worker, "store"))
    considered.setdefault(least.info.name, (least, "least-loaded"))
    return considered


def _beside_stores(workers: Pool, sources: Sequence[Source]) -> Sequence[WorkerView]:
    """Those on a node whose store has the prefix: for them it is a copy inside of the node."""
    nodes = {
        source.holder.info.node
        for source in sources[:MAX_HOLDERS]
        if source.holder.info.role is Role.STORE and source.holder.info.node
    }
    return workers.on_nodes(nodes) if nodes else ()


def _owners(workers: Pool, question: Question) -> list[WorkerView]:
    ring = question.fleet.ring
    if ring is None or not question.group:
        return []
    owners = map(workers.find, ring.owners(question.group, OWNERS))
    return [owner for owner in owners if owner is not None]


def _bounded_owner(workers: Pool, question: Question) -> WorkerView | None:
    ring = question.fleet.ring
    if ring is None or not question.group:
        return None
    loads = {worker.info.name: float(worker.sequences) for worker in workers}
    return workers.find(ring.choose(question.group, loads, LOAD_BOUND))


def _roomy(workers: Pool, blocks: int) -> Pool:
    """Those with so many blocks to give; all when there are none."""
    return workers.where(workers.column(Column.FREE_BLOCKS) >= blocks) or workers


def _about_as_fast(workers: Pool) -> Pool:
    """Those whose predicted TPOT is close to the best. Guesses are all alike."""
    tpot_s = workers.column(Column.TPOT_S)
    return workers.where(tpot_s <= CLOSE_TPOT_SHARE * tpot_s.min())


def _least_busy(workers: Pool, key: str) -> WorkerView:
    return workers.least(Column.DECODE_LOAD).drawn(key)


def _close_holder(least: WorkerView, workers: Pool, prefix: Prefix) -> WorkerView:
    """The holder of the longest match that is about as busy as the least busy worker."""
    blocks = prefix.own.within(workers)
    blocks[workers.column(Column.SEQUENCES) > least.sequences + CLOSE_SEQUENCES] = 0
    first = int(blocks.argmax())
    return workers[first] if blocks[first] > prefix.own.of(least.info.name) else least


def _just(worker: WorkerView, reason: str, question: Question) -> Choice:
    """A choice without comparison; the estimate tells what to expect, and what to fetch."""
    candidate, fetch = estimate(
        worker,
        question.prefix,
        question.fleet.transfers,
        question.arrival,
        reason,
    )
    return Choice(worker, candidate, (candidate,), fetch, reason)
