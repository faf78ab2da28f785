"""Moves workers between prefill and decode: measures for the planner, and does what it says. With
`--advise` alone it only measures, and `GET /cluster` says what is wanted.

    fleet's views --> demands --> Planner --> SetRole --> the worker drains, leaves, registers anew

Of several conductors the one with the least incarnation acts. Each sees the prompts that it sent
itself, so it takes the others to send as many; what decodes is in the workers' own reports.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton.errors import RegistryUnavailable
from baton.rpc.registry import Registry
from baton.types.fleet import Role
from conductor.fleet import Fleet
from conductor.planner import Look, Move, Planner
from conductor.views import FleetView, WorkerView

_OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
_SWITCH_S = 120.0  # a worker that has not taken its role by then is not thought to come
_SLOWER = 2.0  # a step may take so many times that of one sequence, where no SLO says otherwise

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Moved:
    """What was last done, for people. `at` is loop time."""

    at: float
    worker: str
    move: Move


class Elastic:
    """`run` it beside the fleet. `tpot_s` is the SLO, if there is one."""

    def __init__(
        self,
        fleet: Fleet,
        planner: Planner,
        tpot_s: float | None,
        registry: Registry | None,
        incarnation: str,
        on_move: Callable[[Role], None] = lambda _: None,
    ) -> None:
        self.planner = planner
        self.last: Moved | None = None
        self._fleet = fleet
        self._tpot_s = tpot_s
        self._registry = registry
        self._incarnation = incarnation
        self._on_move = on_move
        self._acts = True  # as far as is known; False: another conductor does
        self._prompts_s = 0.0  # of work, that the fleet had been sent at the last look
        self._at: float | None = None

    @property
    def wanted(self) -> tuple[int, int] | None:
        """Workers that should prefill and decode. None: nothing is known, or another one says."""
        return self.planner.wanted if self._acts else None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(self.planner.options.look_s)
            peers = await self._conductors()
            self._acts = peers > 0
            if peers:
                self.look(peers)

    async def _conductors(self) -> int:
        """How many there are; 0 when another one is to act."""
        if self._registry is None:
            return 1
        try:
            known = {info.incarnation for info in await self._registry.conductors()}
        except RegistryUnavailable:
            return 0  # who knows what the others do: the split can wait
        known.add(self._incarnation)
        return len(known) if min(known) == self._incarnation else 0

    def look(self, conductors: int = 1) -> None:
        """Once; `run` does it again and again."""
        now, view = asyncio.get_running_loop().time(), self._fleet.view()
        prompts_s, since = self._fleet.prompts_s, self._at
        work_s, self._prompts_s, self._at = prompts_s - self._prompts_s, prompts_s, now
        if since is None or now <= since:
            return
        prefill, decode = view.live(Role.PREFILL), view.live(Role.DECODE)
        if not prefill or not decode:
            return  # nothing is known of what the other pool would do
        look = Look(
            prefill=len(prefill) + self._comes(Role.PREFILL, view, now),
            decode=len(decode) + self._comes(Role.DECODE, view, now),
            prefill_demand=conductors * work_s / (now - since) + self._late(prefill, now),
            decode_demand=sum(self._decode_demand(worker) for worker in decode),
        )
        move = self.planner.look(look, now)
        if move is not None:
            self._make(move, view, now)

    def _make(self, move: Move, view: FleetView, now: float) -> None:
        able = [worker for worker in view.live(_OTHER[move.role]) if move.role in worker.info.roles]
        if not able:
            log.warning("no worker can %s, although: %s", move.role, move.reason)
            return
        chosen = min(able, key=_busy)
        log.info("worker %s is to %s: %s", chosen.info.name, move.role, move.reason)
        self._fleet.set_role(chosen.peer, move.role)
        self._on_move(move.role)
        self.last = Moved(now, chosen.info.name, move)

    def _comes(self, role: Role, view: FleetView, now: float) -> bool:
        """Whether the worker that was moved last is still on its way to that pool."""
        last = self.last
        if last is None or last.move.role is not role or now - last.at > _SWITCH_S:
            return False
        worker = view.find(last.worker)
        return worker is None or worker.info.role is not role

    def _late(self, workers: Sequence[WorkerView], now: float) -> float:
        """Workers that compute what waits, by the time at which the next move can be judged."""
        waiting_s = sum(max(worker.free_at - now, 0.0) for worker in workers)
        return waiting_s / self.planner.options.settle_s

    def _decode_demand(self, worker: WorkerView) -> float:
        """Workers that this one's sequences keep busy: by the batch that keeps the SLO, in which no
        prompt is that is yet to be computed, or by the blocks that they hold, and where some wait,
        by what they would hold."""
        if not worker.sequences:
            return 0.0
        cost = worker.cost.decode
        step_s = self.planner.options.tpot_s or self._tpot_s or _SLOWER * cost.seconds(1)
        most = (step_s - cost.base_s) / max(cost.sequence_s, 1e-9)
        full = 1 - worker.free_blocks / max(worker.info.num_blocks, 1)
        if worker.load.waiting:  # for blocks, or because the batch has no place
            full = worker.sequences / max(worker.load.running, 1)
        decoding = worker.sequences - (worker.own_attempts - worker.own_decoding)
        return max(decoding / max(most, 1.0), full)


def _busy(worker: WorkerView) -> tuple[int, int, str]:
    """Least first: who has least to finish."""
    return worker.sequences, worker.queued_tokens, worker.info.name
