"""`GET /cluster`: every process of the cluster as `baton status` lists it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import Any

from baton.errors import RegistryUnavailable
from baton.types.figures import TierFigures
from baton.types.fleet import Role, WorkerLoad, WorkerState
from conductor.elastic import Elastic
from conductor.fit import Refusal
from conductor.service import Conductor
from conductor.views import WorkerView


@dataclass(frozen=True, slots=True)
class ConductorIdentity:
    """Who this conductor is. `started_s` is in Unix seconds."""

    name: str
    pid: int
    incarnation: str
    http: str  # host:port
    grpc: str
    started_s: float
    for_workers: str = ""  # where workers register
    scheme: str = "http"  # or https


def describe_cluster(
    conductor: Conductor, identity: ConductorIdentity, most: int | None = None
) -> dict[str, Any]:
    """With at most so many workers, and stores; those that are not live come before others."""
    now = asyncio.get_running_loop().time()
    views = sorted(conductor.fleet.view().workers, key=lambda worker: worker.info.name)
    if most is not None:
        views.sort(key=lambda worker: worker.state is WorkerState.LIVE)
    workers = [view for view in views if view.info.role is not Role.STORE][:most]
    stores = [view for view in views if view.info.role is Role.STORE][:most]
    return {
        "conductors": [_conductor_body(conductor, identity)],
        "workers": [_member_body(view) for view in workers],
        "stores": [_member_body(view) for view in stores],
        "refused": [_refusal_body(refusal) for refusal in conductor.fleet.refusals.recent(now)],
    }


async def other_conductors(
    conductor: Conductor, identity: ConductorIdentity
) -> list[dict[str, Any]]:
    """Those that the registry knows; none while it is away."""
    if conductor.registry is None:
        return []
    try:
        known = await conductor.registry.conductors()
    except RegistryUnavailable:
        return []
    return [
        {
            "name": info.name,
            "role": "conductor",
            "address": info.http,
            "grpc_address": info.grpc,
            "incarnation": info.incarnation,
            "state": "live",
        }
        for info in known
        if info.incarnation != identity.incarnation
    ]


def _conductor_body(conductor: Conductor, identity: ConductorIdentity) -> dict[str, Any]:
    running = conductor.running
    return {
        "name": identity.name,
        "role": "conductor",
        "pid": identity.pid,
        "address": identity.http,
        "grpc_address": identity.grpc,
        "incarnation": identity.incarnation,
        "state": "draining" if conductor.admission.closed else "live",
        "model": conductor.model.name,
        "running": running,
        "waiting": 0,
        **_planner_body(conductor.elastic),
        "load": {"running": running},
        "blocks": {},
    }


def _planner_body(elastic: Elastic | None) -> dict[str, Any]:
    """What the planner thinks, where there is one."""
    if elastic is None:
        return {}
    prefill, decode = elastic.planner.demands
    last, wanted = elastic.last, elastic.wanted
    return {
        **({"wanted": {"prefill": wanted[0], "decode": wanted[1]}} if wanted else {}),
        "planner": {
            "prefill_demand": round(prefill, 3),
            "decode_demand": round(decode, 3),
            "last": f"{last.worker} to {last.move.role}: {last.move.reason}" if last else "",
        },
    }


def _refusal_body(refusal: Refusal) -> dict[str, Any]:
    """A process that wanted to join and does not fit."""
    info = refusal.info
    return {
        "name": info.name,
        "role": info.role.value,
        "pid": info.pid,
        "address": info.address,
        "version": info.version,
        "reason": refusal.reason,
    }


def _member_body(worker: WorkerView) -> dict[str, Any]:
    info, load = worker.info, worker.load
    return {
        "name": info.name,
        "role": info.role.value,
        "pid": info.pid,
        "address": info.address,
        "incarnation": info.incarnation,
        "state": worker.state.value,
        "model": info.model_name,
        "transport": info.transport,
        "device": info.device,
        "cpus": info.cpus,
        "threads": info.threads,
        "num_blocks": info.num_blocks,
        "node": info.node,
        "block_size": info.layout.block_size,
        "max_model_len": info.max_model_len,
        "running": load.running,
        "waiting": load.waiting,
        "load": {
            "running": load.running,
            "waiting": load.waiting,
            "waiting_tokens": load.waiting_tokens,
        },
        "blocks": {state.value: count for state, count in load.blocks},
        **_figures(load, info.layout.block_bytes),
    }


def _figures(load: WorkerLoad, block_bytes: int) -> dict[str, Any]:
    """What only stores, or only workers that have one, tell of themselves."""
    body: dict[str, Any] = {}
    if load.offers is not None:
        body["offers"] = asdict(load.offers)
    if load.store is not None:
        body["store"] = {
            **asdict(load.store),
            "tiers": [_tier_body(tier, block_bytes) for tier in load.store.tiers],
        }
    return body


def _tier_body(tier: TierFigures, block_bytes: int) -> dict[str, Any]:
    return {
        **asdict(tier),
        "bytes": tier.blocks * block_bytes,
        "capacity_bytes": tier.capacity * block_bytes,
    }
