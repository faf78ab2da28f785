"""Membership: which workers there are, how they are, and the link to each.

    register -> JOINING --link up--> LIVE <--renewed--> SUSPECT --lease over--> DEAD --> forgotten
                                      leave -> DRAINING --link closed--> forgotten

States are derived from facts (link, last sign of life); only death is recorded. A report on the
link is a sign of life as good as a renewal. The view of a worker is kept until one of its facts
changes: it is looked at for every request, and there may be a thousand workers.

Stores are members, too. They have a link, and never an attempt.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from baton.errors import BatonError, PeerGone, WorkerLost
from baton.rpc.services import Duplex, WorkerDialer
from baton.types.fleet import FleetLease, KvLayout, Peer, Role, WorkerInfo, WorkerLoad, WorkerState
from baton.types.kv_events import KvEvents, KvSnapshot
from baton.types.link import Cancel, ConductorMessage, SetRole, StepReport, WorkerMessage
from baton.types.request import AttemptId, Finish
from conductor.backlog import EMPTY
from conductor.cost_fit import CostModel
from conductor.cost_model import UNKNOWN_WORKER, WorkerCost
from conductor.fit import Refusals, check_fit
from conductor.kv_feed import KvFeed
from conductor.link import Assignment, Link
from conductor.prefix_map import PrefixMap
from conductor.ring import Ring
from conductor.views import Board, FleetView, WorkerView, boards_of
from conductor.worker_samples import Computed, WorkerMeter

DIAL_TIMEOUT_S = 5.0
FIRST_REDIAL_S = 0.1
LAST_REDIAL_S = 2.0
SUSPECT_SHARE = 0.7  # of the lease: workers renew every third, so one renewal was missed
REMEMBER_DEAD_S = 60.0
RING_CHANGES = 16  # more at once, and a new ring is made sooner
MAP_BLOCKS = 1 << 20  # that the prefix map knows at most, unless the operator says otherwise

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Member:
    info: WorkerInfo
    seen_at: float
    meter: WorkerMeter
    view: WorkerView | None = None  # None: to be made anew
    was_live: bool = False  # when it was last looked at
    load: WorkerLoad = field(default_factory=WorkerLoad)
    link: Link | None = None
    linked_before: bool = False
    orphans: tuple[AttemptId, ...] = ()  # of the link before
    leaving: bool = False
    dead_at: float | None = None
    task: asyncio.Task[None] | None = None
    again: asyncio.TimerHandle | None = None  # to look at it anew

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
        self,
        dialer: WorkerDialer,
        lease_ttl_s: float,
        fingerprint: str | None = None,
        map_blocks: int = MAP_BLOCKS,
        prior: WorkerCost = UNKNOWN_WORKER,
    ) -> None:
        self._dialer = dialer
        self._ttl_s = lease_ttl_s
        self._fingerprint = fingerprint
        self._members: dict[str, _Member] = {}
        self._view: FleetView | None = None
        self._touched: dict[str, None] = {}  # since the last view
        self._views: dict[str, WorkerView] = {}  # in the order of `_members`, with `_boards`
        self._boards: Mapping[Role, Board] | None = None  # None: other workers are live now
        self._view_until = 0.0  # some live worker may be suspect from then on
        self._capacity: int | None = None
        self._ring: tuple[frozenset[str], Ring] = (frozenset(), Ring.of(()))
        self.prompts_s = 0.0  # of work that prefill workers were sent, as predicted; only grows
        self._costs = CostModel(prior)
        self._kv = KvFeed(PrefixMap(map_blocks))
        self.refusals = Refusals()
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
        """Raises LayoutMismatch or ProtocolMismatch, naming both sides, when it does not fit."""
        if self._tasks is None:
            raise PeerGone("the conductor is not running: register again")
        live = [member.info for member in self._members.values() if member.dead_at is None]
        try:
            check_fit(info, live, self._fingerprint)
        except BatonError as error:
            self.refusals.note(info, error.message, _now())
            raise
        self.refusals.forget(info.name)
        old = self._members.get(info.name)
        if old is not None and old.is_life(info.incarnation):
            old.seen_at = _now()
            self._touch(old)
            return FleetLease(accepted=True, ttl_s=self._ttl_s)
        if old is not None:
            self._stop(old, "the worker was started again")
        meter = WorkerMeter(self._costs, info, lambda peer: self._is_near(info, peer))
        member = _Member(info, _now(), meter)
        self._members[info.name] = member
        self._members_changed()
        member.task = self._tasks.create_task(self._keep_link(member), name=f"link {info.name}")
        log.info("worker %s (%s) registered from %s", info.name, info.role, info.address)
        return FleetLease(accepted=True, ttl_s=self._ttl_s)

    async def renew(self, name: str, incarnation: str, load: WorkerLoad) -> FleetLease:
        member = self._members.get(name)
        if member is None or not member.is_life(incarnation):
            return FleetLease(accepted=False, ttl_s=self._ttl_s)
        member.seen_at = _now()
        member.load = load
        self._touch(member)
        return FleetLease(accepted=True, ttl_s=self._ttl_s)

    async def leave(self, name: str, incarnation: str) -> None:
        """The worker takes no more work. It stays until its link ends, to finish what it has."""
        member = self._members.get(name)
        if member is not None and member.is_life(incarnation):
            member.leaving = True
            self._touch(member)
            if member.link is None:
                self._forget(member)

    @property
    def prefix_map(self) -> PrefixMap:
        return self._kv.map

    @property
    def kv_gaps(self) -> int:
        """Times that KV events of a holder were missing."""
        return self._kv.gaps

    def view(self) -> FleetView:
        now = _now()
        if now >= self._view_until:
            self._view_until = now + self._ttl_s
            for member in self._members.values():
                self._touch(member)
        if self._view is None:
            live = self._look(now)
            members, ring = self._ring
            self._view = FleetView(
                tuple(self._views.values()),
                ring if members else None,
                self._costs.transfers(),
                self._costs.ttft_factor,
                {role: board.pool() for role, board in live.items()},
            )
        return self._view

    def _look(self, now: float) -> Mapping[Role, Board]:
        """At those of whom something has changed; at all when others are live now."""
        for name in self._touched:
            member = self._members.get(name)
            if member is not None and member.view is None:
                self._look_at(member, now)
        self._touched.clear()
        if self._boards is None:
            members = self._members
            self._views = {n: m.view or self._look_at(m, now) for n, m in members.items()}
            self._boards = boards_of(self._views.values())
            self._renew_ring(self._boards)
        return self._boards

    def look_at(self, name: str) -> WorkerView | None:
        """One worker as it is now, whatever its state."""
        member = self._members.get(name)
        return None if member is None else member.view or self._look_at(member, _now())

    def _look_at(self, member: _Member, now: float) -> WorkerView:
        link = member.link
        view = member.view = WorkerView(
            info=member.info,
            state=self._state(member, now),
            load=member.load,
            own_attempts=link.attempts if link else 0,
            own_decoding=link.decoding if link else 0,
            backlog=link.backlog() if link else EMPTY,
            cost=member.meter.cost(),
            seen_at=now,
        )
        self._look_again(member, view.backlog.good_until)
        live = view.state is WorkerState.LIVE
        if live is not member.was_live:
            member.was_live = live
            self._boards = None
        if self._boards is not None:
            self._views[member.info.name] = view
            if live:
                self._boards[member.info.role].put(view)
        if live:
            due = member.seen_at + SUSPECT_SHARE * self._ttl_s
            self._view_until = min(self._view_until, max(due, now + self._ttl_s / 100))
        return view

    def _look_again(self, member: _Member, when: float) -> None:
        """A worker that computes a long prompt says nothing, and becomes overdue all the same."""
        if member.again is not None:
            if member.again.when() <= when:
                return
            member.again.cancel()
            member.again = None
        if when < math.inf:
            member.again = asyncio.get_running_loop().call_at(when, self._due_again, member)

    def _due_again(self, member: _Member) -> None:
        member.again = None
        self._touch(member)

    def _members_changed(self) -> None:
        """Somebody has come, died or gone."""
        self._view = self._boards = None
        sizes = [
            min(info.max_model_len, info.num_blocks * info.layout.block_size)
            for member in self._members.values()
            if member.dead_at is None and (info := member.info).role is Role.DECODE
        ]
        self._capacity = max(sizes, default=None)

    def _touch(self, member: _Member) -> None:
        """One of its facts has changed."""
        member.view = self._view = None
        self._touched[member.info.name] = None

    def _renew_ring(self, live: Mapping[Role, Board]) -> None:
        """Over the live workers that compute prompts."""
        workers = live[Role.PREFILL].pool() or live[Role.DECODE].pool()
        members = frozenset(worker.info.name for worker in workers)
        known, ring = self._ring
        if len(members ^ known) > RING_CHANGES:
            ring = Ring.of(sorted(members))
        else:
            for name in known - members:
                ring = ring.without(name)
            for name in sorted(members - known):
                ring = ring.with_(name)
        self._ring = (members, ring)

    def _is_near(self, info: WorkerInfo, peer: str) -> bool:
        other = self._members.get(peer)
        return bool(info.node) and other is not None and other.info.node == info.node

    def capacity(self) -> int | None:
        """Tokens of the longest sequence that some decode worker can hold; None without any."""
        return self._capacity

    def note_ttft(self, estimated_s: float, actual_s: float) -> None:
        """What came of an estimate, so that the next ones are better."""
        self._costs.add_ttft(estimated_s, actual_s)

    def layout(self) -> KvLayout | None:
        """Of the KV of all workers; None while there are none."""
        for member in self._members.values():
            if member.dead_at is None:
                return member.info.layout
        return None

    def start(
        self, worker: Peer, attempt: AttemptId, assignment: Assignment, message: ConductorMessage
    ) -> None:
        """Raises WorkerLost when that life of the worker has no link (any more)."""
        link = self._link_to(worker)
        if link is None:
            raise WorkerLost(f"worker {worker.name} has just gone: try again")
        link.start(attempt, assignment, message)
        if assignment.duty is Role.PREFILL:
            self.prompts_s += assignment.work_s

    def set_role(self, worker: Peer, role: Role) -> None:
        """Ask the worker to take another role. It says so by registering anew."""
        link = self._link_to(worker)
        if link is not None:
            link.post(SetRole(role))

    def cancel(self, worker: Peer, attempt: AttemptId, reason: str) -> None:
        link = self._link_to(worker)
        if link is not None:
            link.cancel(attempt, reason)

    def _link_to(self, worker: Peer) -> Link | None:
        member = self._members.get(worker.name)
        if member is None or not member.is_life(worker.incarnation):
            return None
        return member.open_link

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
        self._view_until = 0.0

    def _sweep(self) -> None:
        now = _now()
        for member in list(self._members.values()):
            if member.dead_at is not None:
                if now - member.dead_at > REMEMBER_DEAD_S:
                    self._forget(member)
            elif now - member.seen_at > self._ttl_s:
                log.warning("worker %s is dead: no sign of life", member.info.name)
                member.dead_at = now
                self._touch(member)
                self._members_changed()
                self._stop(member, f"no sign of life for {self._ttl_s:g} s")
            elif member.link is not None:
                member.link.sweep(now)

    def _stop(self, member: _Member, reason: str) -> None:
        if member.link is not None:
            member.link.say_why(reason)
        if member.task is not None:
            member.task.cancel()
        if member.again is not None:
            member.again.cancel()
        self._kv.drop(member.info.name)

    def _forget(self, member: _Member) -> None:
        self._stop(member, "the worker has left")
        self._remove(member)

    def _remove(self, member: _Member) -> None:
        if self._members.get(member.info.name) is member:
            del self._members[member.info.name]
            self._members_changed()

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
        self._remove(member)

    async def _use_link(
        self, member: _Member, stream: Duplex[ConductorMessage, WorkerMessage]
    ) -> None:
        name = member.info.name
        link = Link(name, stream, _Watch(member, self._touch, self._kv))
        member.link = link
        member.linked_before = True
        self._touch(member)
        self._kv.on_link(name, link.post)
        for attempt in member.orphans:  # the request has gone on elsewhere, or ended
            link.post(Cancel(attempt, "the link to the conductor broke"))
        try:
            reason = await link.run()
        finally:
            member.orphans = link.orphans
            member.link = None
            self._touch(member)
            if self._members.get(name) is member:  # otherwise a new life has been there since
                self._kv.drop(name)
        log.info("the link to worker %s ended: %s", name, reason)


@dataclass(frozen=True, slots=True)
class _Watch:
    """What the link to a member tells about it."""

    member: _Member
    touch: Callable[[_Member], None]
    kv: KvFeed

    def on_report(self, report: StepReport) -> None:
        member = self.member
        member.seen_at = now = _now()
        member.load = report.load
        member.meter.on_report(report, now)
        self.touch(member)

    def on_kv(self, message: KvEvents | KvSnapshot) -> None:
        if self.member.link is not None:
            self.kv.on_message(self.member.info.name, message, self.member.link.post)

    def on_finish(self, held: Assignment, finish: Finish) -> None:
        if held.prompt_tokens and not held.resumed:  # its Finish tells of the prompt alone
            asked = Computed(held.prompt_tokens, held.fetch)
            self.member.meter.on_finish(asked, finish, _now())
            self.touch(self.member)

    def on_change(self) -> None:
        self.touch(self.member)


def _now() -> float:
    return asyncio.get_running_loop().time()
