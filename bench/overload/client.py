"""`python -m bench.overload.client`: a load in a process of its own, with little work per request.

Reads a `Plan` as JSON from standard input, writes what came of each request.

A request is [sent at, status, first bytes, end]: the first on the clock that all processes of a
machine share (CLOCK_MONOTONIC), the others in seconds after it; status 0: the connection broke.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson

from baton.errors import PeerGone
from conductor.bench_client import Connection, request_bytes

_FIRST_ID, _LAST_ID = 5, 4000  # no special tokens of the demo model
_DRAIN_S = 120.0  # for what is still running when the last phase has ended


@dataclass(frozen=True, slots=True)
class Phase:
    """`rate_per_s` (Poisson; 0: nothing is sent), or a closed loop with `at_once` under way."""

    name: str
    seconds: float
    rate_per_s: float = 0.0
    at_once: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Prompts of random ids that nobody has in a cache; answers of exactly `output_tokens`."""

    address: str
    model: str
    prompt_tokens: int
    output_tokens: int
    seed: int
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True)
class Sent:
    at: float
    status: int
    first_s: float
    end_s: float


class Sender:
    """Connections are kept for the next request, as clients do."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._draw = random.Random(plan.seed)
        self._spare: list[Connection] = []
        self.sent: dict[str, list[Sent]] = {phase.name: [] for phase in plan.phases}
        self.began: dict[str, float] = {}

    async def run(self) -> None:
        async with asyncio.timeout(sum(phase.seconds for phase in self._plan.phases) + _DRAIN_S):
            async with asyncio.TaskGroup() as group:
                for phase in self._plan.phases:
                    self.began[phase.name] = time.perf_counter()
                    if phase.at_once:
                        await self._closed(phase)
                    else:
                        await self._open(phase, group)

    async def _closed(self, phase: Phase) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(phase.at_once):
                group.create_task(self._user(phase))

    async def _user(self, phase: Phase) -> None:
        while time.perf_counter() < self.began[phase.name] + phase.seconds:
            await self._ask(phase.name)

    async def _open(self, phase: Phase, group: asyncio.TaskGroup) -> None:
        at = self.began[phase.name]
        end = at + phase.seconds
        while phase.rate_per_s and (at := at + self._draw.expovariate(phase.rate_per_s)) < end:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            group.create_task(self._ask(phase.name))
        await asyncio.sleep(max(0.0, end - time.perf_counter()))

    async def _ask(self, phase: str) -> None:
        request = request_bytes(self._plan.address, "/v1/completions", self._body())
        at = time.perf_counter()
        try:
            async with self._connection() as connection:
                reply = await connection.ask(request)
        except (PeerGone, OSError):
            self.sent[phase].append(Sent(at, 0, 0.0, time.perf_counter() - at))
            return
        self.sent[phase].append(Sent(at, int(reply.status), reply.first_s, reply.end_s))

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        while self._spare and not self._spare[-1].is_open:
            self._spare.pop()
        made = self._spare.pop() if self._spare else await Connection.open(self._plan.address)
        try:
            yield made
        except BaseException:
            made.close()
            raise
        self._spare.append(made)

    def _body(self) -> dict[str, object]:
        prompt = self._draw.choices(range(_FIRST_ID, _LAST_ID), k=self._plan.prompt_tokens)
        return {
            "model": self._plan.model,
            "prompt": prompt,
            "max_tokens": self._plan.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }


async def _main() -> None:
    given = orjson.loads(sys.stdin.buffer.read())
    phases = tuple(Phase(**phase) for phase in given.pop("phases"))
    sender = Sender(Plan(phases=phases, **given))
    await sender.run()
    told = {
        name: {"began": sender.began[name], "sent": [dataclasses.astuple(s) for s in sent]}
        for name, sent in sender.sent.items()
    }
    sys.stdout.buffer.write(orjson.dumps(told))


if __name__ == "__main__":
    asyncio.run(_main())
