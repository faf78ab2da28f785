"""Poisson arrivals of asks with known answers, through all conductors."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from baton.client.http import Client
from baton.errors import BatonError
from bench.soak.asks import (
    ANSWER_TIMEOUT_S,
    EVENT_TIMEOUT_S,
    Answer,
    Ask,
    WholeClient,
    agrees,
    draw_asks,
    error_text,
    stream,
    with_stop,
)

_CANCELS = 0.12  # shares of the requests
_WHOLE = 0.3
_MAX_NOTED = 20
_LEARN_AT_ONCE = 8


@dataclass(slots=True)
class Tally:
    """What became of the requests. `noted` are the first that went wrong, in words."""

    ended: Counter[str] = field(default_factory=Counter)  # by kind and outcome
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    tokens: int = 0
    noted: list[dict[str, Any]] = field(default_factory=list)

    def note(self, kind: str, outcome: str, at_s: float, what: str = "") -> None:
        self.ended[f"{kind} {outcome}"] += 1
        self.outcomes[outcome] += 1
        if what and len(self.noted) < _MAX_NOTED:
            self.noted.append({"at_s": round(at_s, 1), "kind": kind, "what": what[:400]})


class Load:
    """Use as an async context manager: it owns the connections."""

    def __init__(self, urls: Sequence[str], seed: int, asks: int) -> None:
        self._urls = urls
        self._seed = seed
        self._asks = draw_asks(seed, asks)
        self._known: list[tuple[Ask, Answer]] = []
        self._clients: list[Client] = []
        self._wholes: list[WholeClient] = []
        self._began = 0.0
        self._over = False
        self.tally = Tally()

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        for number in range(len(self._urls)):
            urls = [*self._urls[number:], *self._urls[:number]]
            client = Client(",".join(urls), EVENT_TIMEOUT_S)
            self._clients.append(await self._stack.enter_async_context(client))
            http = httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S, trust_env=False)
            await self._stack.enter_async_context(http)
            self._wholes.append(WholeClient(urls, http))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def asked_again(self) -> int:
        """How often an answer that comes whole was asked for again."""
        return sum(client.retries for client in self._wholes)

    async def learn(self) -> None:
        """Ask everything once, before anything goes wrong."""
        turns = asyncio.Semaphore(_LEARN_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            learning = [group.create_task(self._learn(ask, turns)) for ask in self._asks]
        self._known = [known for task in learning for known in task.result()]

    async def _learn(self, ask: Ask, turns: asyncio.Semaphore) -> list[tuple[Ask, Answer]]:
        """With the answer of the same request with a stop string, if there can be one."""
        async with turns:
            answer = await self._wholes[0].ask(ask.as_prompt())
            stopping = with_stop(ask, answer) if ask.kind in ("greedy", "text") else None
            if stopping is None:
                return [(ask, answer)]
            return [(ask, answer), (stopping, await self._wholes[0].ask(stopping.as_prompt()))]

    def stop(self) -> None:
        """Let `run` begin no more."""
        self._over = True

    async def run(self, rate_per_s: float, seconds: float = math.inf) -> None:
        """Return when all that began within `seconds`, or before `stop`, has ended."""
        draw = random.Random(self._seed + 1)
        clock = asyncio.get_running_loop().time
        self._began = at = clock()
        async with asyncio.TaskGroup() as group:
            while (at := at + draw.expovariate(rate_per_s)) < self._began + seconds:
                await asyncio.sleep(max(0.0, at - clock()))
                if self._over:
                    break
                group.create_task(self._one(random.Random(draw.random())))

    async def _one(self, draw: random.Random) -> None:
        ask, right = draw.choice(self._known)
        salt = draw.choice(("", "", "a", "b", f"{draw.random()}"))
        prompt = ask.as_prompt(salt)
        number = draw.randrange(len(self._urls))
        how, cut = "stream", None
        if (chance := draw.random()) < _WHOLE:
            how = "whole"
        elif chance < _WHOLE + _CANCELS:
            how, cut = "cancel", draw.randrange(1, max(2, len(right[0].tokens)))
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            if how == "whole":
                got = await self._wholes[number].ask(prompt)
            else:
                got = await stream(self._clients[number], prompt, cut)
        except (BatonError, TimeoutError) as error:
            self.tally.note(f"{ask.kind} {how}", "lost", began - self._began, error_text(error))
            return
        self.tally.tokens += sum(len(choice.tokens) for choice in got)
        if not agrees(got, right, cut is not None):
            what = f"got {got} instead of {right}"
            self.tally.note(f"{ask.kind} {how}", "wrong", began - self._began, what)
            return
        self.tally.latencies_s.append(loop.time() - began)
        self.tally.note(
            f"{ask.kind} {how}", "ok" if cut is None else "cancelled", began - self._began
        )
