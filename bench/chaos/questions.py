"""What is asked: a marked request per repetition, and the load around it. All of it repeatable."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from baton.client.http import Prompt

MARKED_PROMPT = 1500  # tokens: a dozen steps of prefill, and several hundred KiB of KV per layer
MARKED_ANSWER = 160
AHEAD_PROMPT = 1600  # several of these are what a marked request queues behind
_FIRST_ID, _LAST_ID = 5, 4000  # no special tokens of the demo model


@dataclass(frozen=True, slots=True)
class Question:
    """`name` tells which answer is right: the same one, whatever else is in `options`."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Question:
        """For what changes how it is answered, and not the answer."""
        return replace(self, options={**self.options, **options})

    def as_prompt(self) -> Prompt:
        fixed = {"ignore_eos": True, "return_token_ids": True}
        return Prompt(self.prompt, self.max_tokens, options={**fixed, **self.options})


@dataclass(frozen=True, slots=True)
class Questions:
    """All that a run asks. `marked` are long ones, `ahead` long prompts with short answers,
    `others` short ones of which groups share a prefix."""

    marked: tuple[Question, ...]
    ahead: tuple[Question, ...]
    others: tuple[Question, ...]

    @property
    def all(self) -> tuple[Question, ...]:
        return (*self.marked, *self.ahead, *self.others)


def make_questions(seed: int) -> Questions:
    draw = random.Random(seed)
    marked = tuple(
        Question(f"marked-{n}", _tokens(draw, MARKED_PROMPT), MARKED_ANSWER, options)
        for n, options in enumerate((_GREEDY, _sampled(draw)))
    )
    ahead = tuple(Question(f"ahead-{n}", _tokens(draw, AHEAD_PROMPT), 4, _GREEDY) for n in range(4))
    others = []
    for group in range(4):
        prefix = _tokens(draw, draw.randrange(70, 170))
        for number in range(4):
            prompt = (*prefix, *_tokens(draw, draw.randrange(8, 60)))
            options = _sampled(draw) if number % 2 else _GREEDY
            name = f"other-{group}.{number}"
            others.append(Question(name, prompt, draw.randrange(30, 110), options))
    return Questions(marked, ahead, tuple(others))


_GREEDY: Mapping[str, Any] = {"temperature": 0}


def _sampled(draw: random.Random) -> Mapping[str, Any]:
    return {"temperature": 0.9, "top_p": 0.95, "seed": draw.randrange(1 << 32)}


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(_FIRST_ID, _LAST_ID) for _ in range(count))
