"""A worker's end of the links with a duty that only notes what it is told; the test plays the
conductors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from baton.rpc.memory import MemoryNetwork
from baton.rpc.services import Duplex
from baton.types.fleet import WorkerLoad
from baton.types.link import (
    ConductorMessage,
    StartDecode,
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
from baton.worker.links import ORPHAN_S, LinkServer

Link = Duplex[ConductorMessage, WorkerMessage]
DONE = Finish(FinishReason.STOP)


@dataclass
class FakeDuty:
    started: list[AttemptId] = field(default_factory=list)
    cancelled: list[tuple[AttemptId, str]] = field(default_factory=list)
    refuse: Exception | None = None
    load: WorkerLoad = field(default_factory=WorkerLoad)
    called: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self, message: StartPrefill | StartDecode) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.started.append(message.task.attempt)
        self.called.set()

    def cancel(self, attempt: AttemptId, reason: str) -> None:
        self.cancelled.append((attempt, reason))
        self.called.set()


@dataclass
class Rig:
    duty: FakeDuty
    links: LinkServer
    network: MemoryNetwork

    async def connect(self) -> Link:
        """A new conductor; its first report, which tells the load, is taken."""
        stream = await self.network.worker_dialer("c").link("w", 1.0)
        assert await stream.receive() == StepReport((), self.duty.load)
        return stream

    async def begin(self, stream: Link, attempt: AttemptId) -> None:
        self.duty.called.clear()
        await stream.send(start(attempt))
        await self.call()
        assert self.duty.started[-1] == attempt

    async def call(self) -> None:
        """Wait for the next call of the duty (since the flag was cleared)."""
        async with asyncio.timeout(5):
            await self.duty.called.wait()


def start(attempt: AttemptId) -> StartDecode:
    return StartDecode(GenerationTask(attempt, (1, 2), SamplingParams()))


def token(attempt: AttemptId, index: int = 0, finish: Finish | None = None) -> AttemptOutput:
    return AttemptOutput(attempt, (SampledToken(7, index),), finish)


@asynccontextmanager
async def rig(orphan_timeout_s: float = ORPHAN_S) -> AsyncIterator[Rig]:
    duty = FakeDuty()
    links = LinkServer(duty, lambda: duty.load, orphan_timeout_s=orphan_timeout_s)
    async with MemoryNetwork() as network:
        network.add_worker("w", links)
        yield Rig(duty, links, network)


async def receive(stream: Link) -> StepReport:
    async with asyncio.timeout(5):
        return await stream.receive()


async def error_of(stream: Link, attempt: AttemptId) -> str:
    report = await receive(stream)
    output = report.outputs[0]
    assert output.attempt == attempt
    assert output.finish is not None
    assert output.finish.error is not None
    return output.finish.error.code
