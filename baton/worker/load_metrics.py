"""Metrics of what members of the fleet tell in their load: blocks, sequences, offers, tiers.

The same families whoever exports them: a conductor for all members that it knows, and each member
for itself. So a total is `sum(max by (worker, ...) (...))`, however many processes said it.

A member that was started again counts from 0, as counters of Prometheus do. A store that has died
keeps its series, with no tier up, until the fleet forgets it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from baton.types.figures import StoreFigures, TierState
from baton.types.fleet import Role, WorkerLoad

_PUTS = ("stored", "present", "busy", "pressure", "aborted")
_EVICTIONS = ("demoted", "evicted", "lost")
_OFFERS = ("read", "dropped", "gone", "failed")


@dataclass(frozen=True, slots=True)
class MemberLoad:
    """What is known of one worker or store."""

    name: str
    role: Role
    block_bytes: int
    load: WorkerLoad
    is_dead: bool = False


@dataclass(frozen=True, slots=True)
class _Store:
    name: str
    block_bytes: int
    figures: StoreFigures
    is_dead: bool


def load_families(members: Sequence[MemberLoad]) -> Iterable[Metric]:
    """Only those of which somebody has told something."""
    workers = [member for member in members if member.role is not Role.STORE]
    stores = [
        _Store(member.name, member.block_bytes, member.load.store, member.is_dead)
        for member in members
        if member.load.store is not None
    ]
    families = (*_workers(workers), *_tiers(stores), *_counters(stores), *_pins(stores))
    return [family for family in families if family.samples]


def _workers(workers: Sequence[MemberLoad]) -> Iterable[Metric]:
    blocks = GaugeMetricFamily(
        "baton_worker_blocks", "KV blocks by worker and state.", labels=["worker", "state"]
    )
    sequences = GaugeMetricFamily(
        "baton_worker_sequences",
        "Sequences in workers, running or waiting.",
        labels=["worker", "state"],
    )
    tokens = GaugeMetricFamily(
        "baton_worker_waiting_tokens",
        "Prompt tokens that a worker has yet to compute.",
        labels=["worker"],
    )
    offers = CounterMetricFamily(
        "baton_worker_offers",
        "Offers of KV blocks by a worker to its store, by outcome.",
        labels=["worker", "outcome"],
    )
    for worker in workers:
        name, load = worker.name, worker.load
        sequences.add_metric([name, "running"], load.running)
        sequences.add_metric([name, "waiting"], load.waiting)
        tokens.add_metric([name], load.waiting_tokens)
        for state, count in load.blocks:
            blocks.add_metric([name, state.value], count)
        if load.offers is not None:
            for outcome in _OFFERS:
                offers.add_metric([name, outcome], getattr(load.offers, outcome))
    return blocks, sequences, tokens, offers


def _tiers(stores: Sequence[_Store]) -> Iterable[Metric]:
    labels = ["store", "tier"]
    held = GaugeMetricFamily("baton_store_bytes", "KV in a tier of a store.", labels=labels)
    blocks = GaugeMetricFamily("baton_store_blocks", "KV blocks in a tier.", labels=labels)
    room = GaugeMetricFamily(
        "baton_store_capacity_bytes", "KV that a tier can hold.", labels=labels
    )
    up = GaugeMetricFamily(
        "baton_store_tier_up", "1: the tier takes blocks. 0: full, failed, or dead.", labels=labels
    )
    hits = CounterMetricFamily(
        "baton_store_hits", "KV blocks found, by the tier that they were in.", labels=labels
    )
    for store in stores:
        for tier in store.figures.tiers:
            names = [store.name, tier.tier.value]
            held.add_metric(names, tier.blocks * store.block_bytes)
            blocks.add_metric(names, tier.blocks)
            room.add_metric(names, tier.capacity * store.block_bytes)
            up.add_metric(names, int(tier.state is TierState.ON and not store.is_dead))
            hits.add_metric(names, tier.hits)
    return held, blocks, room, up, hits


def _pins(stores: Sequence[_Store]) -> Iterable[Metric]:
    pinned = GaugeMetricFamily(
        "baton_store_pinned_bytes", "KV that stays in the CPU tier for a time.", labels=["store"]
    )
    refused = CounterMetricFamily(
        "baton_store_pins_refused", "KV blocks that could not be pinned.", labels=["store"]
    )
    for store in stores:
        pinned.add_metric([store.name], store.figures.pinned * store.block_bytes)
        refused.add_metric([store.name], store.figures.pins_refused)
    return pinned, refused


def _counters(stores: Sequence[_Store]) -> Iterable[Metric]:
    puts = CounterMetricFamily(
        "baton_store_puts",
        "KV blocks that were to be stored, by outcome.",
        labels=["store", "outcome"],
    )
    evictions = CounterMetricFamily(
        "baton_store_evictions",
        "KV blocks that left the CPU tier, by what became of them.",
        labels=["store", "outcome"],
    )
    bad = CounterMetricFamily(
        "baton_store_bad_blocks", "KV blocks whose checksum was wrong: forgotten.", labels=["store"]
    )
    errors = CounterMetricFamily(
        "baton_store_disk_errors", "Calls to the disk that failed.", labels=["store"]
    )
    for store in stores:
        for outcome in _PUTS:
            puts.add_metric([store.name, outcome], getattr(store.figures, outcome))
        for outcome in _EVICTIONS:
            evictions.add_metric([store.name, outcome], getattr(store.figures, outcome))
        bad.add_metric([store.name], store.figures.bad_blocks)
        errors.add_metric([store.name], store.figures.disk_errors)
    return puts, evictions, bad, errors
