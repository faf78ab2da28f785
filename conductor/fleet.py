"""Membership: which workers there are, how they are, and the link to each.

    register -> JOINING --link up--> LIVE <--renewed--> SUSPECT --lease over--> DEAD --> forgotten
                                      leave -> DRAINING --link closed--> forgotten

States are derived from facts (link, last sign of life) whenever somebody looks; only death is
recorded. A report on the link is a sign of life as good as a renewal.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from baton.errors import BatonError, LayoutMismatch, PeerGone, WorkerLost
from baton.rpc.services import Duplex, WorkerDialer
from baton.types.fleet import FleetLease, Peer, Role, WorkerInfo, WorkerLoad, WorkerState
from baton.types.link import ConductorMessage, WorkerMessage
from baton.types.request import AttemptId
from conductor.link import Assignment, Link
from conductor.router import FleetView, WorkerView

DIAL_TIMEOUT_S = 5.0
FIRST_REDIAL_S = 0.1
LAST_REDIAL_S = 2.0
SUSPECT_SHARE = 0.7  # of the lease: workers renew every third, so one renewal was missed
REMEMBER_DEAD_S = 60.0

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    info: WorkerInfo
    seen_at: float
    load: WorkerLoad = field(default_factory=WorkerLoad)
    link: Link | None = None
    linked_before: bool = False
    leaving: bool = False
    dead_at: float | None = None
    task: asyncio.Task[None] | None = None

    @property
    def open_link(self) -> Link | None:
        return None if self.link is None or self.link.ended else self.link

    def is_life(self, incarnation: str) -> bool:
        return self.info.incarnation == incarnation and self.dead_at is None


class Fleet:
    """Implements FleetService. `run` owns every task and stream; it runs as long as the conductor.

    `fingerprint` is the model that this conductor has the tokenizer of; None trusts the first
    worker.
    """

    def __init__(
        self, dialer: WorkerDialer, lease_ttl_s: float, fingerprint: str | None = None
    ) -> None:
        self._dialer = dialer
        self._ttl_s = lease_ttl_s
        self._fingerprint = fingerprint
        self._members: dict[str, _Member] = {}
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Keep links and leases until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                interval_s = self._ttl_s / 10
                while True:
                    due = _now() + interval_s
                    await asyncio.sleep(interval_s)
                    self._excuse(_now() - due)
                    self._sweep()
            finally:
                self._tasks = None
                for member in self._members.values():
                    self._stop(member, "the conductor is closing")

    async def register(self, info: WorkerInfo) -> FleetLease:
        """Raises LayoutMismatch, naming both sides, when the worker does not fit the fleet."""
        if self._tasks is None:
            raise PeerGone("the conductor is not running: register again")
        self._check_layout(info)
        old = self._members.get(info.name)
        if old is not None and old.is_life(info.incarnation):
            old.seen_at = _now()
            return FleetLease(accepted=True, ttl_s=self._ttl_s)
        if old is not None:
            self._stop(old, "the worker was started again")
        member = _Member(info, seen_at=_now())
        self._members[info.name] = member
        member.task = self._tasks.create_task(self._keep_link(member), name=f"link {info.name}")
        log.info("worker %s (%s) registered from %s", info.name, info.role, info.address)
        return FleetLease(accepted=True, ttl_s=self._ttl_s)

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        member = self._members.get(name)
        if member is None or not member.is_life(incarnation):
            return FleetLease(accepted=False, ttl_s=self._ttl_s)
        member.seen_at = _now()
        member.load = load
        return FleetLease(accepted=True, ttl_s=self._ttl_s)

    async def leave(self, name: str, incarnation: str) -> None:
        """The worker takes no more work. It stays until its link ends, to finish what it has."""
        member = self._members.get(name)
        if member is not None and member.is_life(incarnation):
            member.leaving = True
            if member.link is None:
                self._forget(member)

    def view(self) -> FleetView:
        now = _now()
        return FleetView(
            tuple(
                WorkerView(
                    info=member.info,
                    state=self._state(member, now),
                    load=member.load,
                    own_attempts=member.link.attempts if member.link else 0,
                    own_prompt_tokens=member.link.prompt_tokens if member.link else 0,
                )
                for member in self._members.values()
            )
        )

    def capacity(self) -> int | None:
        """Tokens of the longest sequence that some decode worker can hold; None without any."""
        sizes = [
            worker.capacity
            for worker in self.view().workers
            if worker.info.role is Role.DECODE and worker.state is not WorkerState.DEAD
        ]
        return max(sizes, default=None)

    def start(
        self, worker: Peer, attempt: AttemptId, assignment: Assignment, message: ConductorMessage
    ) -> None:
        """Raises WorkerLost when that life of the worker has no link (any more)."""
        link = self._link_to(worker)
        if link is None:
            raise WorkerLost(f"worker {worker.name} has just gone: try again")
        link.start(attempt, assignment, message)

    def cancel(self, worker: Peer, attempt: AttemptId, reason: str) -> None:
        link = self._link_to(worker)
        if link is not None:
            link.cancel(attempt, reason)

    def _link_to(self, worker: Peer) -> Link | None:
        member = self._members.get(worker.name)
        if member is None or not member.is_life(worker.incarnation):
            return None
        return member.open_link

    def _check_layout(self, info: WorkerInfo) -> None:
        if self._fingerprint is not None and info.layout.model != self._fingerprint:
            raise LayoutMismatch(
                f"worker {info.name} serves {info.model_name} ({info.layout.describe()}), but "
                f"this conductor serves the model with fingerprint {self._fingerprint[:12]}: "
                "start both with the same model"
            )
        for member in self._members.values():
            other = member.info
            if member.dead_at is None and other.name != info.name and other.layout != info.layout:
                raise LayoutMismatch(
                    f"worker {info.name} has {info.layout.describe()}, but worker {other.name} of "
                    f"this fleet has {other.layout.describe()}: start both with the same settings"
                )

    def _state(self, member: _Member, now: float) -> WorkerState:
        if member.dead_at is not None:
            return WorkerState.DEAD
        if member.leaving:
            return WorkerState.DRAINING
        if member.open_link is None:
            return WorkerState.SUSPECT if member.linked_before else WorkerState.JOINING
        silent = now - member.seen_at > SUSPECT_SHARE * self._ttl_s
        return WorkerState.SUSPECT if silent else WorkerState.LIVE

    def _excuse(self, late_s: float) -> None:
        """When this process itself stood still, what workers said meanwhile is yet to be read."""
        for member in self._members.values():
            member.seen_at += late_s

    def _sweep(self) -> None:
        now = _now()
        for member in list(self._members.values()):
            if member.dead_at is not None:
                if now - member.dead_at > REMEMBER_DEAD_S:
                    self._forget(member)
            elif now - member.seen_at > self._ttl_s:
                log.warning("worker %s is dead: no sign of life", member.info.name)
                member.dead_at = now
                self._stop(member, f"no sign of life for {self._ttl_s:g} s")
            elif member.link is not None:
                member.link.sweep(now)

    def _stop(self, member: _Member, reason: str) -> None:
        if member.link is not None:
            member.link.say_why(reason)
        if member.task is not None:
            member.task.cancel()

    def _forget(self, member: _Member) -> None:
        self._stop(member, "the worker has left")
        if self._members.get(member.info.name) is member:
            del self._members[member.info.name]

    async def _keep_link(self, member: _Member) -> None:
        """Dial the worker, again and again, until it leaves; its lease ends this task otherwise."""
        delay = FIRST_REDIAL_S
        while not member.leaving:
            try:
                stream = await self._dialer.link(member.info.address, DIAL_TIMEOUT_S)
            except BatonError as error:
                if delay == FIRST_REDIAL_S:
                    log.warning("worker %s cannot be reached: %s", member.info.name, error.message)
                await asyncio.sleep(delay)
                delay = min(2 * delay, LAST_REDIAL_S)
            else:
                delay = FIRST_REDIAL_S
                await self._use_link(member, stream)
                await asyncio.sleep(0 if member.leaving else delay)
        if self._members.get(member.info.name) is member:
            del self._members[member.info.name]

    async def _use_link(
        self, member: _Member, stream: Duplex[ConductorMessage, WorkerMessage]
    ) -> None:
        def on_report(load: WorkerLoad) -> None:
            member.seen_at = _now()
            member.load = load

        member.link = Link(member.info.name, stream, on_report)
        member.linked_before = True
        try:
            reason = await member.link.run()
        finally:
            member.link = None
        log.info("the link to worker %s ended: %s", member.info.name, reason)


def _now() -> float:
    return asyncio.get_running_loop().time()
