"""One run: start a cluster, let clients and faults at it, heal it, and see that nothing is left.

start -> requests and faults -> all processes live again -> probes -> idle -> shutdown
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from baton.errors import DeadlineExceeded
from baton.types.fleet import WorkerState
from conductor.records import LINGER_S
from sim.checks import (
    check_books,
    check_gone,
    check_leases,
    check_released,
    check_story,
    holdings,
    is_idle,
    release_s,
)
from sim.checks_conductors import (
    OrphanWatch,
    check_registry_empty,
    check_story_of_several,
    check_withdrawn,
)
from sim.clients import CONDUCTOR_LOST, NO_END, Story, ask
from sim.cluster import Cluster
from sim.log import ErrorsAreViolations, EventLog
from sim.loop import SimLoop, StandStill
from sim.network import Network
from sim.plan import DEADLINE_S, Client, Plan, make_plan
from sim.plan_conductors import make_plan_of_several
from sim.process import BURIAL_S, ROUNDS
from sim.reconnect import Caller
from sim.trouble import Trouble

HEAL_S = 20.0  # until every process is live again after the last fault
IDLE_S = 12.0  # until everything is idle after the last request
SHUTDOWN_S = 30.0
POLL_S = 0.1

GOOD_ENDS = ("ok", "cancelled", "hurried")


@dataclass(frozen=True, slots=True)
class Outcome:
    seed: int
    violations: tuple[str, ...]
    codes: tuple[tuple[str, int], ...]  # how many requests ended with which code
    errors: tuple[str, ...]  # of requests that failed as they may
    faults: tuple[str, ...]
    virtual_s: float
    digest: str  # of the log; like the log empty unless something is wrong, or it was asked for
    log: tuple[str, ...]


def run_seed(seed: int, verbose: bool = False) -> Outcome:
    return run_plan(make_plan(seed), verbose)


def run_seed_of_several(seed: int, verbose: bool = False) -> Outcome:
    """With several conductors."""
    return run_plan(make_plan_of_several(seed), verbose)


def run_plan(plan: Plan, verbose: bool = False) -> Outcome:
    """Never raises because of what the cluster does."""
    loop = SimLoop()
    log = EventLog(lambda: loop.now)
    loop.set_exception_handler(lambda _, about: log.violation(_describe(about)))
    errors = ErrorsAreViolations(log)
    run = _Run(plan, loop, log)
    root = logging.getLogger()
    level = root.level
    root.addHandler(errors)
    root.setLevel(logging.ERROR)
    gc.disable()
    try:
        loop.run_until_complete(run.main())
    except StandStill as stuck:
        log.violation(str(stuck))
    finally:
        violations = tuple(log.violations)
        digest = log.digest() if verbose or violations else ""
        root.removeHandler(errors)
        root.setLevel(logging.CRITICAL)
        loop.set_exception_handler(lambda _, about: None)
        _bury(loop, run)
        root.setLevel(level)
        loop.close()
        gc.enable()
    return Outcome(
        seed=plan.seed,
        violations=violations,
        codes=tuple(sorted(Counter(_kind(story) for story in run.stories).items())),
        errors=tuple(
            f"{story.client.name} {story.code}: {story.message}"
            for story in run.stories
            if _kind(story) not in GOOD_ENDS
        ),
        faults=tuple(fault.kind.value for fault in plan.faults),
        virtual_s=loop.now,
        digest=digest,
        log=tuple(log.lines()) if verbose or violations else (),
    )


class _Run:
    def __init__(self, plan: Plan, loop: SimLoop, log: EventLog) -> None:
        self.stories: list[Story] = []
        self._plan = plan
        self._loop = loop
        self._log = log
        self._network = Network(plan.weather, plan.seed, loop, log)
        self._cluster = Cluster(plan.shape, plan.seed, self._network, log)
        self._trouble = Trouble(self._cluster, loop, log)
        self._orphans = OrphanWatch(self._cluster)

    async def main(self) -> None:
        cluster, log = self._cluster, self._log
        await cluster.start_all()
        if not await self._until(self._all_live, HEAL_S):
            log.violation("the cluster did not start")
        watching = asyncio.create_task(self._watch_leases())
        async with asyncio.TaskGroup() as group:
            for fault in self._plan.faults:
                group.create_task(self._trouble.suffer(fault))
            for client in self._plan.clients:
                group.create_task(self._be_client(client))
        self._network.calm = True
        self._check_alive()
        if not await self._until(self._all_live, HEAL_S):
            log.violation(f"the cluster did not heal: {self._states()}")
        for probe in self._plan.probes:
            await self._be_client(probe, is_probe=True)
        watching.cancel()
        await self._come_to_rest()
        for wrong in check_books(cluster):
            log.violation(wrong)
        for story in self.stories:
            for wrong in self._check_story(story):
                log.violation(wrong)
        await self._shut_down()
        if cluster.registry is not None:
            await asyncio.sleep(DEADLINE_S + LINGER_S)
            for wrong in check_registry_empty(cluster):
                log.violation(wrong)

    def _check_story(self, story: Story) -> list[str]:
        incidents = self._network.incidents
        if story.client.habits is not None:
            return check_story_of_several(story, incidents, self._plan.shape)
        return check_story(story, incidents, self._trouble.halted_s)

    async def bury(self) -> None:
        """End all tasks, so that Python has nothing to complain about."""
        for process in [*self._cluster.dead, *self._cluster.processes()]:
            await process.bury()
        await end_others()

    # -- clients -------------------------------------------------------------------------------

    async def _be_client(self, client: Client, is_probe: bool = False) -> None:
        await asyncio.sleep(client.at)
        story = Story(client, self._loop.now)
        self.stories.append(story)
        if client.habits is not None:
            caller = Caller(story, self._cluster, self._loop, self._log)
            await caller.run()
            await caller.forgotten()
        elif not await self._ask_once(story):
            return
        await asyncio.sleep(release_s(self._plan.shape))
        for wrong in check_released(self._cluster, story):
            self._log.violation(wrong)
        if is_probe and story.code != "ok":
            self._log.violation(f"{client.name} failed in a healed cluster: {story.code}")

    async def _ask_once(self, story: Story) -> bool:
        """The only conductor. False when it is not there: then there is no story."""
        client = story.client
        conductor = self._cluster.conductor
        if conductor is None:  # nobody listens: no request of the cluster's
            self.stories.remove(story)
            return False
        self._log.note(client.name, "asks", (len(client.prompt), client.sampling.max_tokens))
        asking = conductor.process.spawn(ask(story, conductor, self._log), client.name)
        waiting: set[asyncio.Future[Any]] = {asking, conductor.process.gone}
        tiring = asyncio.create_task(story.tired.wait())
        waiting.add(tiring)
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done() and not conductor.process.gone.done():
            self._log.note(client.name, "goes away")
            asking.cancel()
            await asyncio.wait(
                [asking, conductor.process.gone], return_when=asyncio.FIRST_COMPLETED
            )
        if not asking.done():
            story.code = CONDUCTOR_LOST
        elif not asking.cancelled() and (error := asking.exception()) is not None:
            self._log.violation(f"{client.name} broke: {error!r}")
        elif not story.code:
            story.code = "cancelled"
        story.ended = self._loop.now
        tiring.cancel()
        return True

    async def _watch_leases(self) -> None:
        while not self._log.violations:
            now = self._loop.now
            for wrong in (*check_leases(self._cluster, now), *self._orphans.check(now)):
                self._log.violation(wrong)
            await asyncio.sleep(POLL_S)

    # -- the end -------------------------------------------------------------------------------

    async def _until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        deadline = self._loop.now + limit_s
        while not holds():
            if self._loop.now > deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True

    def _states(self) -> dict[str, dict[str, WorkerState]]:
        """Of the workers, as each conductor sees them."""
        states = {}
        for name, conductor in self._cluster.conductors.items():
            view = conductor.process.do(conductor.service.fleet.view)
            states[name] = {worker.info.name: worker.state for worker in view.workers}
        return states

    def _all_live(self) -> bool:
        states, shape = self._states(), self._plan.shape
        return all(
            states.get(conductor.name, {}).get(machine.name) is WorkerState.LIVE
            for conductor in shape.conductors
            for machine in shape.machines
        )

    async def _come_to_rest(self) -> None:
        """Until nothing has moved for a second, which is time enough for the last news of blocks.
        Offers that waited to dial a store again may begin late: seeds 3465, 3790, 3998."""
        until = self._loop.now + IDLE_S
        at_rest = False
        while not at_rest and self._loop.now < until:
            await self._until(self._all_idle, until - self._loop.now)
            before = self._blocks()
            await asyncio.sleep(1.0)
            at_rest = self._all_idle() and self._blocks() == before

    def _blocks(self) -> list[object]:
        hosts = self._cluster.workers.values()
        return [(hosted.service.load().blocks, holdings(hosted)) for hosted in hosts]

    def _all_idle(self) -> bool:
        return all(is_idle(hosted) for hosted in self._cluster.workers.values())

    def _check_alive(self) -> None:
        for hosted in self._cluster.workers.values():
            if hosted.main.done():
                self._log.violation(f"{hosted.process.incarnation} ended: {_why(hosted.main)}")
        for name, conductor in self._cluster.conductors.items():
            if conductor.main.done():
                self._log.violation(f"the conductor {name} ended: {_why(conductor.main)}")

    async def _shut_down(self) -> None:
        """As SIGTERM does, workers first."""
        cluster = self._cluster
        self._check_alive()
        for hosted in cluster.workers.values():
            hosted.process.do(hosted.signals.stop.set)
        mains = [hosted.main for hosted in cluster.workers.values()]
        if mains:
            _, late = await asyncio.wait(mains, timeout=SHUTDOWN_S)
            for task in late:
                self._log.violation(f"{task.get_name()} did not end")
        conductors = [conductor.main for conductor in cluster.conductors.values()]
        for main in conductors:
            main.cancel()
        if conductors:
            await asyncio.wait(conductors, timeout=SHUTDOWN_S)
        await asyncio.sleep(1.0)
        for hosted in cluster.workers.values():
            if hosted.main.done() and (why := _why(hosted.main)):
                self._log.violation(f"{hosted.process.incarnation} ended badly: {why}")
        for wrong in check_withdrawn(cluster):
            self._log.violation(wrong)
        for process in cluster.processes():
            for wrong in check_gone(process):
                self._log.violation(wrong)
        for disk in cluster.disks.values():
            for wrong in disk.check_closed():
                self._log.violation(wrong)


def _kind(story: Story) -> str:
    """How it ended. Who had no time to wait is not counted as failed."""
    late = story.client.hurry and story.code in (DeadlineExceeded.code, NO_END)
    return "hurried" if late else story.code


def _why(task: asyncio.Task[None]) -> str:
    error = None if task.cancelled() else task.exception()
    return "" if error is None else repr(error)


def _describe(about: dict[str, Any]) -> str:
    error = about.get("exception")
    return f"unhandled: {about.get('message')} {error!r}"


async def end_others() -> None:
    """The harness's own tasks, and those that a process got from another one's burial, after its
    own. Their clean-up takes steps, too."""
    for _ in range(ROUNDS):
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others:
            return
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=BURIAL_S)


def _bury(loop: SimLoop, run: _Run) -> None:
    burial = loop.create_task(run.bury())
    for _ in range(ROUNDS):
        with suppress(StandStill):  # of what is being buried
            loop.run_until_complete(burial)
            loop.run_until_complete(loop.shutdown_asyncgens())
            return
