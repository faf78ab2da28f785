"""A conductor's link: what it passes on, and to whom."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from baton.rpc.memory import MemoryDuplex, duplex_pair
from baton.types.fleet import Role, WorkerLoad
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import (
    ConductorMessage,
    Resync,
    StartPrefill,
    StepReport,
    WorkerMessage,
)
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    SamplingParams,
)
from conductor.backlog import EMPTY
from conductor.link import Assignment, Link, Stage
from tests.virtual_time import settle, virtual_time

R, S = AttemptId("r"), AttemptId("s")


@dataclass
class Watcher:
    reports: list[StepReport] = field(default_factory=list)
    kv: list[KvEvents | KvSnapshot] = field(default_factory=list)
    finished: list[tuple[int, Finish]] = field(default_factory=list)
    changes: int = 0

    def on_report(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_kv(self, message: KvEvents | KvSnapshot) -> None:
        self.kv.append(message)

    def on_finish(self, held: Assignment, finish: Finish) -> None:
        self.finished.append((held.prompt_tokens, finish))

    def on_change(self) -> None:
        self.changes += 1


class Deaf:
    def on_output(self, duty: Role, worker: str, output: AttemptOutput) -> None:
        return

    def on_lost(
        self, duty: Role, worker: str, attempt: AttemptId, stage: Stage, reason: str
    ) -> None:
        return


Pair = tuple[
    MemoryDuplex[ConductorMessage, WorkerMessage], MemoryDuplex[WorkerMessage, ConductorMessage]
]


def start(
    link: Link, attempt: AttemptId, seconds: float, priority: int = 0, slack_s: float = 0.0
) -> None:
    task = GenerationTask(attempt, (1, 2, 3), SamplingParams())
    assignment = Assignment(Role.PREFILL, Deaf(), 3, seconds, priority, slack_s)
    link.start(attempt, assignment, StartPrefill(task))


def first_token(attempt: AttemptId) -> StepReport:
    return StepReport((AttemptOutput(attempt, (SampledToken(7, 0),)),), WorkerLoad())


async def test_kv_messages_and_reports_go_to_their_listeners_and_a_resync_to_the_worker() -> None:
    pair: Pair = duplex_pair("conductor", "worker")
    near, far = pair
    watcher = Watcher()
    link = Link("worker", near, watcher)
    running = asyncio.create_task(link.run())
    told: list[KvEvents | KvSnapshot] = [
        KvSnapshot(4, Tier.GPU, bytes(16), first=True, last=True),
        KvEvents(5, Tier.CPU, added=bytes(16)),
    ]
    await far.send(told[0])
    await far.send(StepReport((), WorkerLoad(running=3)))
    await far.send(told[1])
    link.post(Resync())
    assert await far.receive() == Resync()
    await far.aclose()
    await running
    assert watcher.kv == told
    assert watcher.reports == [StepReport((), WorkerLoad(running=3))]
    link.post(Resync())  # the link has ended: nobody hears it, and nothing breaks


@virtual_time
async def test_a_prompt_is_work_until_its_first_token() -> None:
    pair: Pair = duplex_pair("conductor", "worker")
    near, far = pair
    watcher = Watcher()
    link = Link("worker", near, watcher)
    running = asyncio.create_task(link.run())
    start(link, R, 4.0)
    start(link, S, 2.0)
    assert link.backlog().ahead_s(0.0, (0, 0.0)) == 6.0
    await asyncio.sleep(1)
    assert link.backlog().ahead_s(1.0, (0, 1.0)) == 5.0
    await far.send(first_token(R))  # earlier than predicted
    await settle()
    assert (link.backlog().tokens, link.backlog().free_at) == (3, 3.0)
    await asyncio.sleep(20)
    assert link.backlog().free_at > 21.0  # overdue, but not done
    link.cancel(S, "enough")
    assert link.backlog() == EMPTY
    assert link.attempts == 1
    finish = Finish(FinishReason.HANDED_OFF)
    await far.send(StepReport((AttemptOutput(R, (), finish),), WorkerLoad()))
    await far.send(StepReport((AttemptOutput(S, (), finish),), WorkerLoad()))
    await settle()
    assert link.attempts == 0
    assert watcher.finished == [(3, finish)]  # what was cancelled tells nothing
    await far.aclose()
    await running


@virtual_time
async def test_urgent_prompts_wait_for_urgent_ones_only() -> None:
    pair: Pair = duplex_pair("conductor", "worker")
    link = Link("worker", pair[0], Watcher())
    start(link, R, 4.0, priority=5)
    start(link, S, 1.0, priority=0)
    backlog = link.backlog()
    assert backlog.ahead_s(0.0, (5, 0.0)) == 5.0
    assert backlog.ahead_s(0.0, (0, 0.0)) == 1.0
    assert backlog.ahead_s(0.0, (-1, 0.0)) == 0.0


@virtual_time
async def test_prompts_wait_for_those_that_are_due_before_them() -> None:
    link = Link("worker", duplex_pair("conductor", "worker")[0], Watcher())
    start(link, R, 4.0, slack_s=4.0)
    await asyncio.sleep(1.0)
    start(link, S, 1.0, slack_s=1.0)
    backlog = link.backlog()
    assert backlog.free_at == 5.0
    assert backlog.ahead_s(1.0, (0, 2.5)) == 1.0
    assert backlog.ahead_s(1.0, (0, 5.0)) == 4.0


@virtual_time
async def test_a_lost_link_has_no_work() -> None:
    pair: Pair = duplex_pair("conductor", "worker")
    near, far = pair
    link = Link("worker", near, Watcher())
    running = asyncio.create_task(link.run())
    start(link, R, 4.0)
    await settle()
    assert isinstance(await far.receive(), StartPrefill)
    await far.aclose()
    await running
    assert (link.attempts, link.backlog()) == (0, EMPTY)


class Confused(Watcher):
    def on_kv(self, message: KvEvents | KvSnapshot) -> None:
        raise ValueError("nonsense")


async def test_what_cannot_be_dealt_with_ends_this_link_and_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    near, far = duplex_pair("conductor", "worker")
    link = Link("worker", near, Confused())
    running = asyncio.create_task(link.run())
    await far.send(KvEvents(5, Tier.CPU, added=bytes(16)))
    assert "could not deal with" in await asyncio.wait_for(running, 5)
    assert link.ended
    assert "what worker worker said" in caplog.text
