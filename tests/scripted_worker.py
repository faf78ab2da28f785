"""Several conductors over one registry, and workers that answer from a script behind real links, so
that answers can be orphaned and adopted. No handoffs: decode workers compute prompts themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from baton.rpc.memory import MemoryNetwork
from baton.rpc.registry_memory import MemoryRegistry, RegistryServer
from baton.types.fleet import Role, WorkerLoad
from baton.types.link import StartDecode, StartPrefill
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    TokenLogprob,
)
from baton.worker.links import LinkServer
from conductor.service import Conductor, Policy
from tests.fake_worker import tiny_model, worker_info

TOKEN_S = 1.0  # virtual time that a token takes


async def until(condition: Callable[[], bool]) -> None:
    """Look a few times per token."""
    async with asyncio.timeout(100.0):
        while not condition():  # noqa: ASYNC110 (plain conditions have no event)
            await asyncio.sleep(0.1)


class ScriptedWorker:
    """Implements Duty. Says `answer`, one token a second, whatever it is asked."""

    def __init__(self, answer: tuple[int, ...]) -> None:
        self.answer = answer
        self.links = LinkServer(self, lambda: WorkerLoad(running=len(self.work)))
        self.work: dict[AttemptId, asyncio.Task[None]] = {}
        self.tasks: list[GenerationTask] = []

    def start(self, message: StartPrefill | StartDecode) -> None:
        task = message.task
        self.tasks.append(task)
        self.work[task.attempt] = asyncio.create_task(self._answer(task))

    def cancel(self, attempt: AttemptId, reason: str) -> None:
        if attempt in self.work:
            self.work.pop(attempt).cancel()
            self._tell(attempt, (), Finish(FinishReason.CANCELLED))

    async def _answer(self, task: GenerationTask) -> None:
        wanted = min(len(self.answer), task.sampling.max_tokens)
        for index in range(len(task.output), wanted):
            await asyncio.sleep(TOKEN_S)
            logprob = None if task.sampling.logprobs is None else TokenLogprob(-0.5)
            self._tell(task.attempt, (SampledToken(self.answer[index], index, logprob),), None)
        del self.work[task.attempt]
        whole = wanted == len(self.answer)
        reason = FinishReason.STOP if whole else FinishReason.LENGTH
        self._tell(task.attempt, (), Finish(reason, cached_tokens=3))

    def _tell(
        self, attempt: AttemptId, tokens: tuple[SampledToken, ...], finish: Finish | None
    ) -> None:
        self.links.report((AttemptOutput(attempt, tokens, finish),))


@dataclass
class Site:
    """A cluster with several conductors."""

    network: MemoryNetwork
    registry: RegistryServer
    workers: dict[str, ScriptedWorker]
    conductors: list[Conductor] = field(default_factory=list)
    running: list[asyncio.Task[None]] = field(default_factory=list)

    async def add_conductor(self, registry: bool = True, alone: bool = False) -> Conductor:
        """Linked to all workers, unless it is to be `alone` for now."""
        name = f"conductor-{len(self.conductors)}"
        conductor = Conductor(
            tiny_model(),
            self.network.worker_dialer(name),
            Policy(lease_ttl_s=1e6),
            registry=MemoryRegistry(self.registry, name) if registry else None,
        )
        self.conductors.append(conductor)
        self.running.append(asyncio.create_task(conductor.run()))
        await asyncio.sleep(0)
        if not alone:
            await self.link_workers(conductor)
        return conductor

    async def link_workers(self, conductor: Conductor) -> None:
        for worker in self.workers:
            await conductor.fleet.register(worker_info(worker, Role.DECODE))
        await until(lambda: len(conductor.fleet.view().live(Role.DECODE)) == len(self.workers))

    async def kill_conductor(self, number: int) -> None:
        """As SIGKILL does: its links break, and nobody hears a last word of it."""
        self.network.kill(f"conductor-{number}")
        self.running[number].cancel()
        await asyncio.gather(self.running[number], return_exceptions=True)

    def all_tasks(self) -> list[GenerationTask]:
        return [task for worker in self.workers.values() for task in worker.tasks]


@asynccontextmanager
async def site(answer: tuple[int, ...], workers: int = 2) -> AsyncIterator[Site]:
    """With two conductors. In virtual time; afterwards no worker has anything left to do."""
    async with MemoryNetwork() as network:
        names = [f"decode-{number}" for number in range(workers)]
        place = Site(network, RegistryServer(), {name: ScriptedWorker(answer) for name in names})
        for name, worker in place.workers.items():
            network.add_worker(worker_info(name, Role.DECODE).address, worker.links)
        try:
            await place.add_conductor()
            await place.add_conductor()
            yield place
            await until(lambda: not any(w.work for w in place.workers.values()))
            assert all(conductor.running == 0 for conductor in place.conductors)
        finally:
            for task in place.running:
                task.cancel()
            await asyncio.gather(*place.running, return_exceptions=True)
