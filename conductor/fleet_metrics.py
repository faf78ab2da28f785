"""Metrics of the fleet as a conductor knows it: read when it is scraped."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.types.fleet import Role, WorkerState
from baton.worker.load_metrics import MemberLoad, load_families
from conductor.fleet import Fleet
from conductor.views import WorkerView


class FleetCollector(Collector):
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        views = self._fleet.view().workers
        yield _members(views)
        yield from load_families([_load_of(view) for view in views])
        yield from self._prefix_map()

    def _prefix_map(self) -> Iterable[Metric]:
        known = self._fleet.prefix_map
        values = {
            "baton_prefix_map_blocks": ("KV blocks whose holders are known.", known.num_blocks),
            "baton_prefix_map_bytes": ("Memory of the prefix map.", known.memory_bytes),
        }
        for name, (help_text, value) in values.items():
            yield GaugeMetricFamily(name, help_text, value=value)
        yield CounterMetricFamily(
            "baton_kv_resyncs",
            "Times that a holder's KV events had a gap, so that all its blocks were told anew.",
            value=self._fleet.kv_gaps,
        )


def _members(views: Iterable[WorkerView]) -> Metric:
    """Every role in every state, zeros too: alerts ask whether there is none."""
    family = GaugeMetricFamily(
        "baton_workers", "Workers and stores by role and state.", labels=["role", "state"]
    )
    tally = Tally((view.info.role, view.state) for view in views)
    for role in Role:
        for state in WorkerState:
            family.add_metric([role.value, state.value], tally[role, state])
    return family


def _load_of(view: WorkerView) -> MemberLoad:
    info = view.info
    is_dead = view.state is WorkerState.DEAD
    return MemberLoad(info.name, info.role, info.layout.block_bytes, view.load, is_dead)
