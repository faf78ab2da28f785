"""Steady load: some clients that go on elsewhere when a stream breaks, some that cannot."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import openai

from bench.chaos.checks import find_difference
from bench.chaos.clients import Asking
from bench.chaos.questions import Question, Questions
from bench.chaos.references import Answers
from bench.rolling.plain import Balancer, PlainAsking


class Kind(StrEnum):
    BATON = "baton's client"
    PLAIN = "OpenAI's SDK"


@dataclass(frozen=True, slots=True)
class Answered:
    """One request. Times of the event loop; `problem` is empty when all was well."""

    kind: Kind
    question: str
    began: float
    ended: float
    problem: str

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Load:
    """Each client asks one question after the other, until `stop`."""

    def __init__(self, urls: Sequence[str], questions: Questions, answers: Answers) -> None:
        self._urls = urls
        self._answers = answers
        # Every fifth is a long one.
        short = itertools.cycle(questions.others)
        long = itertools.cycle(questions.marked)
        self._questions = (next(long) if n % 5 == 4 else next(short) for n in itertools.count())
        self._number = itertools.count()
        self._over = False
        self.answered: list[Answered] = []

    def stop(self) -> None:
        """What is asked is answered still."""
        self._over = True

    async def run(self, baton: int, plain: int) -> None:
        """With so many clients of each kind. Until all has been answered after `stop`."""
        balancer = Balancer(self._urls)
        try:
            async with (
                openai.AsyncOpenAI(base_url=self._urls[0], api_key="none", max_retries=0) as sdk,
                asyncio.TaskGroup() as group,
            ):
                for n in range(baton):
                    turn = n % len(self._urls)
                    urls = (*self._urls[turn:], *self._urls[:turn])
                    group.create_task(self._client(Kind.BATON, partial(Asking, urls=urls)))
                for _ in range(plain):
                    ask = partial(PlainAsking, urls=self._urls, sdk=sdk, balancer=balancer)
                    group.create_task(self._client(Kind.PLAIN, ask))
        finally:
            await balancer.close()

    async def _client(self, kind: Kind, ask: Callable[[Question], Asking]) -> None:
        while not self._over:
            question = self._next_question()
            asking = ask(question)
            await asking.run()
            self.answered.append(
                Answered(kind, question.name, asking.began, asking.ended, self._problem(asking))
            )

    def _next_question(self) -> Question:
        """Half of them with a prefix that nobody has cached."""
        number = next(self._number)
        question = next(self._questions)
        return question.with_options(cache_salt=f"salt-{number}") if number % 2 else question

    def _problem(self, asking: Asking) -> str:
        if asking.error:
            return asking.error
        return find_difference(asking.tokens, self._answers[asking.question.name])
