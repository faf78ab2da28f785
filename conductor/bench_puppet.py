"""Workers that compute nothing, for measuring a conductor: they register and speak the real link.

A step gives one token to every attempt, and all tokens of a step travel in one report, as in a real
worker. The handoff takes no time: the decode worker goes on from the second token at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from baton.errors import PeerGone
from baton.rpc.grpc_client import GrpcFleetClient
from baton.rpc.grpc_server import RpcServer
from baton.rpc.services import Duplex
from baton.rpc.tls import Certificates
from baton.types.fleet import KvLayout, Role, WorkerInfo, WorkerLoad
from baton.types.link import (
    Cancel,
    ConductorMessage,
    StartDecode,
    StartPrefill,
    StepReport,
    WorkerMessage,
)
from baton.types.request import AttemptId, AttemptOutput, Finish, FinishReason, SampledToken

TOKEN_ID, TOKEN_TEXT = 36, b"@"  # of the demo model; a character that JSON does not use
SERVER_GRACE_S = 1.0


@dataclass(slots=True)
class Pace:
    """Of all workers together: how long a step takes (0: as long as the conductor takes to read
    it), and how long the last prompt took, from its start to the report of its first token."""

    step_s: float = 0.0
    prefill_s: float = 0.0


@dataclass(slots=True)
class _Going:
    """An attempt: tokens [index, end) are still to come, then `finish`."""

    index: int
    end: int
    finish: FinishReason


class Puppet:
    """Implements WorkerService."""

    def __init__(self, pace: Pace) -> None:
        self.linked = asyncio.Event()
        self._pace = pace
        self._going: dict[AttemptId, _Going] = {}
        self._wake = asyncio.Event()
        self._prompt_at: float | None = None  # when the last one came, until its first token goes

    async def link(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        self.linked.set()
        steps = asyncio.create_task(self._step(stream), name="steps")
        try:
            while True:
                self._take(await stream.receive())
        except PeerGone:
            return
        finally:
            steps.cancel()
            await asyncio.wait([steps])

    def _take(self, message: ConductorMessage) -> None:
        match message:
            case StartPrefill(task):
                self._prompt_at = time.perf_counter()
                alone = task.sampling.max_tokens == 1
                finish = FinishReason.LENGTH if alone else FinishReason.HANDED_OFF
                self._going[task.attempt] = _Going(0, 1, finish)
            case StartDecode(task, prefill):
                first = 0 if prefill is None else 1
                ends_here = task.sampling.max_tokens > first
                finish = FinishReason.LENGTH if ends_here else FinishReason.CANCELLED
                self._going[task.attempt] = _Going(first, task.sampling.max_tokens, finish)
            case Cancel(attempt):
                self._going.pop(attempt, None)
        self._wake.set()

    async def _step(self, stream: Duplex[WorkerMessage, ConductorMessage]) -> None:
        due = time.perf_counter()
        while True:
            await self._wake.wait()
            outputs = tuple(self._outputs())
            if not self._going:
                self._wake.clear()
            await stream.send(StepReport(outputs, WorkerLoad(running=len(self._going))))
            now = time.perf_counter()
            if self._prompt_at is not None:
                self._pace.prefill_s, self._prompt_at = now - self._prompt_at, None
            due = max(due + self._pace.step_s, now)
            await asyncio.sleep(due - now)

    def _outputs(self) -> Iterator[AttemptOutput]:
        for attempt, going in list(self._going.items()):
            tokens = (SampledToken(TOKEN_ID, going.index),) if going.index < going.end else ()
            going.index += 1
            finish = None
            if going.index >= going.end:
                del self._going[attempt]
                finish = Finish(going.finish)
            yield AttemptOutput(attempt, tokens, finish)


@asynccontextmanager
async def puppets(
    conductor: str,
    token: str,
    fingerprint: str,
    pairs: int,
    pace: Pace,
    tls: Certificates | None = None,
) -> AsyncIterator[None]:
    """`pairs` prefill and as many decode workers, registered with the conductor at that address."""
    made = [Puppet(pace) for _ in range(2 * pairs)]
    async with AsyncExitStack() as stack:
        fleet = GrpcFleetClient(conductor, token, tls=tls)
        stack.push_async_callback(fleet.aclose)
        for number, puppet in enumerate(made):
            server = RpcServer("127.0.0.1:0", token, tls=tls)
            server.add_worker(puppet)
            stack.push_async_callback(server.stop, SERVER_GRACE_S)
            role = Role.PREFILL if number < pairs else Role.DECODE
            await fleet.register(_info(role, number, await server.start(), fingerprint))
        await asyncio.gather(*(puppet.linked.wait() for puppet in made))
        yield


def _info(role: Role, number: int, address: str, fingerprint: str) -> WorkerInfo:
    return WorkerInfo(
        name=f"{role.value}-{number}",
        role=role,
        incarnation="1",
        address=address,
        pid=1,
        model_name="bench",
        layout=KvLayout(fingerprint, "bfloat16", 36, 8, 128, 32),
        num_blocks=100_000,
        max_model_len=100_000,
        transport="loopback",
    )
