"""The right answers, from the same cluster before anything is done to it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from bench.chaos.clients import Asking
from bench.chaos.processes import ChaosFailed
from bench.chaos.questions import Question

Answers = Mapping[str, tuple[int, ...]]


async def find_answers(urls: Sequence[str], questions: Sequence[Question]) -> Answers:
    """Each question is asked alone, then all at once with nothing cached. Raises ChaosFailed when
    an answer depends on that: then tokens of disturbed runs could not be compared."""
    alone: dict[str, tuple[int, ...]] = {}
    for question in questions:
        alone[question.name] = await _ask(urls, question)
    salted = [question.with_options(cache_salt="together") for question in questions]
    together = await asyncio.gather(*(_ask(urls, question) for question in salted))
    for question, answer in zip(questions, together, strict=True):
        if answer != alone[question.name]:
            raise ChaosFailed(f"{question.name} has another answer in a batch: use other kernels")
    return alone


async def _ask(urls: Sequence[str], question: Question) -> tuple[int, ...]:
    asking = Asking(question, urls)
    await asking.run()
    if asking.error or len(asking.tokens) != question.max_tokens:
        raise ChaosFailed(f"{question.name} got no answer from a cluster at peace: {asking.error}")
    return tuple(asking.tokens)
