"""How a worker is chosen among those that have room: one pure function per policy.

    random, round-robin    for comparison: by the request's key or number alone
    least-loaded           the shortest queue (prefill), the fewest sequences (decode)
    consistent-hash        the owner of the prompt's prefix group, with bounded loads
    cache-aware            the smallest predicted TTFT, after Mooncake's Algorithm 1 (FAST'25)

For a decode worker that gets the KV from a prefill worker, the last three differ only in that
cache-aware prefers one which holds the prefix, among those that are about as busy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import attrgetter
from typing import NamedTuple

import xxhash

from baton.types.fleet import Role
from baton.types.link import FetchPart
from conductor.estimate import Candidate, Prefix, Source, estimate
from conductor.views import FleetView, WorkerView

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
    priority: int
    prefix: Prefix
    fleet: FleetView
    now: float


Workers = Sequence[WorkerView]


def choose_prefill(policy: RoutePolicy, workers: Workers, question: Question) -> Choice:
    """Who computes the prompt, among `workers`, of which there is at least one."""
    if policy is RoutePolicy.CACHE_AWARE:
        return _by_ttft(workers, question)
    if policy is RoutePolicy.CONSISTENT_HASH and (owner := _bounded_owner(workers, question)):
        return _just(owner, "owner", question)
    if policy is RoutePolicy.RANDOM:
        return _just(_drawn(workers, f"{question.key}/prefill"), "random", question)
    if policy is RoutePolicy.ROUND_ROBIN:
        return _just(_in_turn(workers, question.number), "round-robin", question)
    return _just(least_queued(workers, question), "least-loaded", question)


def choose_decode(
    policy: RoutePolicy, workers: Workers, blocks: int, question: Question
) -> WorkerView:
    """Who decodes, among `workers` (at least one); `blocks` is what the sequence may need."""
    if policy is RoutePolicy.RANDOM:
        return _drawn(workers, f"{question.key}/decode")
    if policy is RoutePolicy.ROUND_ROBIN:
        return _in_turn(workers, question.number)
    roomy = [worker for worker in workers if worker.free_blocks >= blocks] or workers
    if policy is not RoutePolicy.CACHE_AWARE:
        return _least_busy(roomy, question.key)
    fast = _about_as_fast(roomy)
    least = _least_busy(fast, question.key)
    return _close_holder(least, fast, question.prefix) if question.prefix.own else least


def choose_alone(policy: RoutePolicy, workers: Workers, blocks: int, question: Question) -> Choice:
    """Who computes the prompt and decodes, too."""
    if policy not in (RoutePolicy.LEAST_LOADED, RoutePolicy.CACHE_AWARE):
        return choose_prefill(policy, workers, question)
    roomy = [worker for worker in workers if worker.free_blocks >= blocks] or workers
    if policy is RoutePolicy.LEAST_LOADED:
        return _just(_least_busy(roomy, question.key), "least-loaded", question)
    least = _least_busy(_about_as_fast(roomy), question.key)
    own, load = question.prefix.own, least.decode_load
    most = least.sequences + max(CLOSE_SEQUENCES, least.sequences // 4)
    close = [
        worker
        for worker in roomy
        if worker.decode_load <= load or (worker.sequences <= most and worker.info.name in own)
    ]
    return _by_ttft(close, question)


def least_queued(workers: Workers, question: Question) -> WorkerView:
    """The one that could begin first; of several, the one with the least to compute."""
    now = question.now
    soonest = max(min(worker.free_at for worker in workers), now)
    tied = [worker for worker in workers if worker.free_at <= soonest]
    return _drawn(_with_least(tied, "queued_tokens"), question.key)


def _by_ttft(workers: Workers, question: Question) -> Choice:
    """Algorithm 1 on those that can win: owners of the group, holders, and the least loaded."""
    prefix, transfers = question.prefix, question.fleet.transfers
    plans = [
        (worker, *estimate(worker, prefix, transfers, question.now, question.priority, why))
        for worker, why in _consider(workers, question).values()
    ]
    best = min([candidate.ttft_s for _, candidate, _ in plans])
    limit = best + max(TIE_S, TIE_SHARE * best)
    # Equal estimates: whoever has the prefix, then the owner, who comes first of the rest.
    tied = [plan for plan in plans if plan[1].ttft_s <= limit]
    worker, chosen, fetch = max(tied, key=lambda plan: plan[1].cached_tokens)
    reason = "fetch" if fetch else "cached" if chosen.cached_tokens else chosen.why
    return Choice(worker, chosen, tuple([candidate for _, candidate, _ in plans]), fetch, reason)


def _consider(workers: Workers, question: Question) -> dict[str, tuple[WorkerView, str]]:
    """By name, owners first: with equal estimates the first one is taken."""
    considered: dict[str, tuple[WorkerView, str]] = {}
    least = least_queued(workers, question)
    if question.group or question.prefix.own:
        by_name = {worker.info.name: worker for worker in workers}
        for owner in _owners(by_name, question):
            # An owner that works while another worker is idle would only gather a queue.
            if owner.free_at <= max(least.free_at, question.now):
                considered[owner.info.name] = (owner, "owner")
                break
        holders = [name for name in question.prefix.holders() if name in by_name]
        for name in holders[:MAX_HOLDERS]:
            considered.setdefault(name, (by_name[name], "holder"))
        for worker in _beside_stores(workers, question.prefix.sources):
            considered.setdefault(worker.info.name, (worker, "store"))
    considered.setdefault(least.info.name, (least, "least-loaded"))
    return considered


def _beside_stores(workers: Workers, sources: Sequence[Source]) -> Workers:
    """Those on a node whose store has the prefix: for them it is a copy inside of the node."""
    nodes = {
        source.holder.info.node
        for source in sources[:MAX_HOLDERS]
        if source.holder.info.role is Role.STORE and source.holder.info.node
    }
    return [worker for worker in workers if worker.info.node in nodes] if nodes else ()


def _owners(by_name: Mapping[str, WorkerView], question: Question) -> list[WorkerView]:
    ring = question.fleet.ring
    if ring is None or not question.group:
        return []
    owners = ring.owners(question.group, OWNERS)
    return [by_name[name] for name in owners if name in by_name]


def _bounded_owner(workers: Workers, question: Question) -> WorkerView | None:
    ring = question.fleet.ring
    if ring is None or not question.group:
        return None
    by_name = {worker.info.name: worker for worker in workers}
    loads = {name: float(worker.sequences) for name, worker in by_name.items()}
    return by_name.get(ring.choose(question.group, loads, LOAD_BOUND))


def _about_as_fast(workers: Workers) -> Workers:
    """Those whose predicted TPOT is close to the best. Guesses are all alike."""
    limit = CLOSE_TPOT_SHARE * min(worker.tpot_s for worker in workers)
    return [worker for worker in workers if worker.tpot_s <= limit]


def _least_busy(workers: Workers, key: str) -> WorkerView:
    return _drawn(_with_least(workers, "decode_load"), key)


def _close_holder(least: WorkerView, workers: Workers, prefix: Prefix) -> WorkerView:
    """The holder of the longest match that is about as busy as the least busy worker."""
    best, best_blocks = least, prefix.own.get(least.info.name, 0)
    for worker in workers:
        blocks = prefix.own.get(worker.info.name, 0)
        if blocks > best_blocks and worker.sequences <= least.sequences + CLOSE_SEQUENCES:
            best, best_blocks = worker, blocks
    return best


def _just(worker: WorkerView, reason: str, question: Question) -> Choice:
    """A choice without comparison; the estimate tells what to expect, and what to fetch."""
    candidate, fetch = estimate(
        worker,
        question.prefix,
        question.fleet.transfers,
        question.now,
        question.priority,
        reason,
    )
    return Choice(worker, candidate, (candidate,), fetch, reason)


def _with_least(workers: Workers, attribute: str) -> Workers:
    if len(workers) == 1:
        return workers
    value = attrgetter(attribute)
    least = min(map(value, workers))
    return [worker for worker in workers if value(worker) == least]


def _drawn(workers: Workers, key: str) -> WorkerView:
    """One of them by the hash of `key`, whatever their order."""
    if len(workers) == 1:
        return workers[0]
    number = xxhash.xxh3_64_intdigest(key.encode()) % len(workers)
    return sorted(workers, key=_name)[number]


def _in_turn(workers: Workers, number: int) -> WorkerView:
    return sorted(workers, key=_name)[number % len(workers)]


_name = attrgetter("info.name")
