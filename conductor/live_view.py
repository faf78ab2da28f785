"""One look at the whole cluster, as `GET /live` and `GET /live.json` give it: the fleet as
`GET /cluster` lists it, with figures of the last minutes, KV flows and the last requests.

It is made when somebody asks, at most once a tick whoever asks, and not at all without viewers.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson

from baton.types.fleet import Role
from conductor.cluster import ConductorIdentity, describe_cluster
from conductor.service import Conductor
from conductor.trace import Timeline
from conductor.views import WorkerView

TICK_S = 1.0
MAX_MEMBERS = 128  # of workers and of stores that are listed; pools count all
MAX_REQUESTS = 40


class LiveView:
    """`snapshot` is the JSON of this tick; `next_at` the loop time of the next one."""

    def __init__(self, conductor: Conductor, identity: ConductorIdentity) -> None:
        self._conductor = conductor
        self._identity = identity
        self._snapshot = b""
        self._offers: dict[str, tuple[str, int]] = {}  # by worker: its life, blocks a store read
        self.next_at = 0.0

    def snapshot(self) -> bytes:
        now = asyncio.get_running_loop().time()
        if now >= self.next_at:
            self.next_at = now + TICK_S
            self._snapshot = orjson.dumps(self._look())
        return self._snapshot

    def _look(self) -> dict[str, Any]:
        conductor = self._conductor
        views = conductor.fleet.view().workers
        self._note_offers(views)
        return {
            "time_s": round(time.time(), 3),
            "tick_s": TICK_S,
            "model": conductor.model.name,
            "context": conductor.limits.context,
            "ready": conductor.ready,
            **describe_cluster(conductor, self._identity, most=MAX_MEMBERS),
            "pools": {role.value: _pool(views, role) for role in Role},
            **conductor.live.figures(),
            "flows": conductor.live.flows(),
            "requests": [_request(each) for each in conductor.traces.recent(MAX_REQUESTS)],
        }

    def _note_offers(self, views: tuple[WorkerView, ...]) -> None:
        """What nodes' stores have read of their workers since the last look, as flows of KV."""
        stores = {view.info.node: view.info.name for view in views if view.info.role is Role.STORE}
        before, self._offers = self._offers, {}
        for view in views:
            info, offers = view.info, view.load.offers
            if offers is None or info.node not in stores:
                continue
            self._offers[info.name] = info.incarnation, offers.read
            life, read = before.get(info.name, ("", 0))
            if life == info.incarnation and offers.read > read:
                num_bytes = (offers.read - read) * info.layout.block_bytes
                self._conductor.live.note_offers(info.name, stores[info.node], num_bytes)


def _pool(views: tuple[WorkerView, ...], role: Role) -> dict[str, Any]:
    """All members of a role together."""
    members = [view for view in views if view.info.role is role]
    states: dict[str, int] = {}
    for view in members:
        states[view.state.value] = states.get(view.state.value, 0) + 1
    return {
        "members": len(members),
        "states": states,
        "running": sum(view.load.running for view in members),
        "waiting": sum(view.load.waiting for view in members),
    }


def _request(timeline: Timeline) -> dict[str, Any]:
    """A row of the table of requests. `duration_s` is None while it runs."""
    attempts = list(timeline.attempts.values())
    decision = attempts[-1].decision if attempts else None
    prefill = decision.prefill if decision is not None else None
    adopted = attempts[-1].adopted_at if attempts else ""
    return {
        "id": timeline.request_id,
        "outcome": timeline.outcome,
        "received_s": round(timeline.received_s, 3),
        "ttft_s": timeline.ttft_s,
        "tpot_s": timeline.tpot_s,
        "duration_s": timeline.ended_s and timeline.ended_s - timeline.received_s,
        "prompt_tokens": timeline.prompt_tokens,
        "cached_tokens": timeline.cached_tokens,
        "output_tokens": timeline.output_tokens,
        "prefill": prefill.info.name if prefill is not None else None,
        "decode": decision.decode.info.name if decision is not None else adopted or None,
        "attempts": len(attempts),
    }
