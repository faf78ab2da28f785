"""Metrics of what stores and workers count themselves; see `baton.types.figures`.

A store that was started again counts from 0, as counters of Prometheus do. A store that has died
keeps its series, with no tier up, until the fleet forgets it.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.types.figures import StoreFigures, TierState
from baton.types.fleet import WorkerState
from conductor.fleet import Fleet
from conductor.views import WorkerView

_PUTS = ("stored", "present", "busy", "pressure", "aborted")
_EVICTIONS = ("demoted", "evicted", "lost")
_OFFERS = ("read", "dropped", "gone", "failed")


class StoreCollector(Collector):
    """Reads the fleet when it is scraped."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        views = self._fleet.view().workers
        stores = [(view, view.load.store) for view in views if view.load.store is not None]
        return *_tiers(stores), *_counters(stores), *_pins(stores), _offers(views)


def _tiers(stores: list[tuple[WorkerView, StoreFigures]]) -> Iterable[Metric]:
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
    for view, figures in stores:
        nbytes = view.info.layout.block_bytes
        for tier in figures.tiers:
            names = [view.info.name, tier.tier.value]
            held.add_metric(names, tier.blocks * nbytes)
            blocks.add_metric(names, tier.blocks)
            room.add_metric(names, tier.capacity * nbytes)
            is_up = tier.state is TierState.ON and view.state is not WorkerState.DEAD
            up.add_metric(names, int(is_up))
            hits.add_metric(names, tier.hits)
    return held, blocks, room, up, hits


def _pins(stores: list[tuple[WorkerView, StoreFigures]]) -> Iterable[Metric]:
    pinned = GaugeMetricFamily(
        "baton_store_pinned_bytes", "KV that stays in the CPU tier for a time.", labels=["store"]
    )
    refused = CounterMetricFamily(
        "baton_store_pins_refused", "KV blocks that could not be pinned.", labels=["store"]
    )
    for view, figures in stores:
        pinned.add_metric([view.info.name], figures.pinned * view.info.layout.block_bytes)
        refused.add_metric([view.info.name], figures.pins_refused)
    return pinned, refused


def _counters(stores: list[tuple[WorkerView, StoreFigures]]) -> Iterable[Metric]:
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
    for view, figures in stores:
        name = view.info.name
        for outcome in _PUTS:
            puts.add_metric([name, outcome], getattr(figures, outcome))
        for outcome in _EVICTIONS:
            evictions.add_metric([name, outcome], getattr(figures, outcome))
        bad.add_metric([name], figures.bad_blocks)
        errors.add_metric([name], figures.disk_errors)
    return puts, evictions, bad, errors


def _offers(views: Iterable[WorkerView]) -> Metric:
    offers = CounterMetricFamily(
        "baton_worker_offers",
        "Offers of KV blocks by a worker to its store, by outcome.",
        labels=["worker", "outcome"],
    )
    for view in views:
        if view.load.offers is not None:
            for outcome in _OFFERS:
                offers.add_metric([view.info.name, outcome], getattr(view.load.offers, outcome))
    return offers
