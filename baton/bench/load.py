"""Sends sessions open loop (at given times) or closed loop (as many turns at once as given)."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.bench.ideal import InfiniteCache
from baton.bench.sessions import Session
from baton.bench.stats import Outcome
from baton.client.http import Client, Prompt
from baton.client.timing import Stopwatch
from baton.errors import BatonError

OnOutcome = Callable[[Outcome], None]


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Seconds since the start at which requests of a Poisson process arrive."""
    generator = random.Random(seed)
    at = 0.0
    while True:
        yield at
        at += generator.expovariate(rate_per_s)


@dataclass(slots=True)
class _Talk:
    """A session on its way: what was said so far, prompts and answers."""

    session: Session
    said: list[int] = field(default_factory=list)
    turn: int = 0

    @property
    def over(self) -> bool:
        return self.turn == len(self.session.turns)


class Load:
    """One run against one cluster. `on_outcome` is called as each request ends."""

    def __init__(self, client: Client, cache: InfiniteCache, on_outcome: OnOutcome) -> None:
        self._client = client
        self._cache = cache
        self._on_outcome = on_outcome
        self._clock = asyncio.get_running_loop().time
        self._start = self._clock()
        self._outcomes: list[Outcome] = []

    async def closed_loop(
        self, sessions: Sequence[Session], concurrency: int, alive: int = 0
    ) -> list[Outcome]:
        """Keep `concurrency` turns under way until all are answered.

        At most `alive` sessions (0: as many as are under way) take turns: the next turn of one
        comes after one of each of the others.
        """
        waiting = iter([_Talk(session) for session in sessions])
        turns = sum(len(session.turns) for session in sessions)
        line: asyncio.Queue[_Talk | None] = asyncio.Queue()
        for talk in itertools.islice(waiting, max(alive, concurrency)):
            line.put_nowait(talk)

        async def user() -> None:
            while (talk := await line.get()) is not None:
                await self._turn(talk, planned_s=None)
                if talk.over:
                    talk = next(waiting, None)
                if talk is not None:
                    line.put_nowait(talk)
                if len(self._outcomes) == turns:
                    for _ in range(concurrency):
                        line.put_nowait(None)

        if not turns:
            return []
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(user())
        return self._outcomes

    async def open_loop(
        self, sessions: Sequence[Session], arrivals: Iterator[float]
    ) -> list[Outcome]:
        """Begin each session at its arrival time, whether or not earlier ones have been answered;
        a session's later turns follow as it is answered."""

        async def one(session: Session, planned_s: float) -> None:
            talk = _Talk(session)
            await self._turn(talk, planned_s)
            while not talk.over:
                await self._turn(talk, planned_s=None)

        async with asyncio.TaskGroup() as group:
            for session, planned_s in zip(sessions, arrivals, strict=False):
                await asyncio.sleep(max(0.0, self._start + planned_s - self._clock()))
                group.create_task(one(session, planned_s))
        return self._outcomes

    async def _turn(self, talk: _Talk, planned_s: float | None) -> None:
        turn = talk.session.turns[talk.turn]
        talk.turn += 1
        talk.said += turn.tokens
        ideal = self._cache.expect(talk.said)
        outcome, answer = await self._ask(tuple(talk.said), turn.max_tokens, planned_s, ideal)
        if answer:
            talk.said += answer
            self._cache.learn(talk.said)
        self._outcomes.append(outcome)
        self._on_outcome(outcome)

    async def _ask(
        self, prompt: tuple[int, ...], max_tokens: int, planned_s: float | None, ideal: int
    ) -> tuple[Outcome, list[int]]:
        started_s = self._clock() - self._start
        late_s = 0.0 if planned_s is None else started_s - planned_s
        watch = Stopwatch()
        answer: list[int] = []
        options = {"temperature": 0.0, "ignore_eos": True, "return_token_ids": True}
        request = Prompt(prompt, max_tokens=max_tokens, options=options)
        try:
            async with aclosing(watch.watch(self._client.stream(request))) as pieces:
                async for piece in pieces:
                    answer += piece.token_ids
        except BatonError as error:
            ended_s = self._clock() - self._start
            return Outcome(started_s, ended_s, error=error.message, late_s=late_s), []
        ended_s = self._clock() - self._start
        outcome = Outcome(
            started_s, ended_s, timing=watch.timing, late_s=late_s, ideal_cached_tokens=ideal
        )
        return outcome, answer
