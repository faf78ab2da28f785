"""What clients ask, and what they got: streams and whole answers, retried as clients do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from baton.client.errors import error_from
from baton.client.http import Client, Prompt
from baton.errors import BatonError, DeadlineExceeded, NoWorker, PeerGone

EVENT_TIMEOUT_S = 60.0  # without a new event
ANSWER_TIMEOUT_S = 300.0
_TRIES = 12  # of a request whose answer comes whole: nothing was given to the client before
_PAUSE_S = 1.0
_FIRST_ID, _LAST_ID = 5, 4000  # no special tokens of the demo model


@dataclass(frozen=True, slots=True)
class Choice:
    tokens: tuple[int, ...]
    text: str
    finish_reason: str | None


Answer = tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; asked again it has the same answer, whatever its salt."""

    kind: str
    prompt: str | tuple[int, ...]
    max_tokens: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_prompt(self, salt: str = "") -> Prompt:
        more: dict[str, Any] = {"return_token_ids": True, **self.options}
        if salt:
            more["cache_salt"] = salt
        return Prompt(self.prompt, self.max_tokens, options=more)


def draw_asks(seed: int, count: int) -> list[Ask]:
    """Short and long prompts, text and ids, greedy and seeded, one and two answers."""
    draw = random.Random(seed)
    source = Path(random.__file__).read_text()  # a text that every Python has
    prefixes = [_ids(draw, draw.randrange(64, 400)) for _ in range(4)]
    asks = []
    for number in range(count):
        options: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
        kind = ("greedy", "seeded", "long", "two", "text")[number % 5]
        length = draw.randrange(600, 1300) if kind == "long" else draw.randrange(8, 120)
        prompt: str | tuple[int, ...] = (*draw.choice(prefixes), *_ids(draw, length))
        if kind == "text":
            at = draw.randrange(len(source) - 600)
            prompt = source[at : at + draw.randrange(40, 600)]
        elif kind != "greedy":
            options |= {"temperature": 0.9, "top_p": 0.95, "seed": draw.randrange(1 << 32)}
        if kind == "two":
            options |= {"n": 2, "repetition_penalty": 1.1}
        asks.append(Ask(kind, prompt, draw.randrange(16, 220), options))
    return asks


def with_stop(ask: Ask, answer: Answer) -> Ask | None:
    """The same with a stop string from the middle of its answer; None when there is none."""
    text = answer[0].text
    stop = text[len(text) // 2 :][:4]
    if len(stop) < 4:
        return None
    return Ask("stop", ask.prompt, ask.max_tokens, {**ask.options, "stop": [stop]})


def _ids(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(_FIRST_ID, _LAST_ID) for _ in range(count))


async def stream(client: Client, prompt: Prompt, cancel_after: int | None = None) -> Answer:
    """The answer, or its beginning: a client that has `cancel_after` tokens goes away."""
    parts: dict[int, list[Any]] = {}
    count = 0
    async with asyncio.timeout(ANSWER_TIMEOUT_S), aclosing(client.stream(prompt)) as pieces:
        async for piece in pieces:
            if piece.usage is not None:
                continue
            parts.setdefault(piece.index, []).append(piece)
            count += len(piece.token_ids)
            if cancel_after is not None and count >= cancel_after:
                break
    return tuple(
        Choice(
            tuple(token for piece in pieces for token in piece.token_ids),
            "".join(piece.text for piece in pieces),
            pieces[-1].finish_reason,
        )
        for _, pieces in sorted(parts.items())
    )


@dataclass(slots=True)
class WholeClient:
    """Answers in one piece. When the connection breaks nothing of the answer has come, so asking
    another conductor again is what any client library does. `retries` counts that."""

    urls: Sequence[str]
    http: httpx.AsyncClient
    retries: int = 0

    async def ask(self, prompt: Prompt) -> Answer:
        body = prompt.body("demo") | {"stream": False}
        del body["stream_options"]
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            for number in range(_TRIES):
                try:
                    return await self._once(self.urls[number % len(self.urls)] + prompt.path, body)
                except (PeerGone, DeadlineExceeded, NoWorker):
                    if number == _TRIES - 1:
                        raise
                    self.retries += 1
                if number % len(self.urls) == len(self.urls) - 1:
                    await asyncio.sleep(_PAUSE_S)
        raise AssertionError  # the loop returns or raises

    async def _once(self, url: str, body: Mapping[str, Any]) -> Answer:
        try:
            response = await self.http.post(url, json=body)
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{url} did not answer in time") from error
        except httpx.HTTPError as error:
            raise PeerGone(f"{url}: {error!r}") from error
        if response.is_error:
            raise error_from(response.status_code, response.content, response.headers)
        return tuple(
            Choice(tuple(choice["token_ids"]), choice["text"], choice["finish_reason"])
            for choice in response.json()["choices"]
        )


def error_text(error: BatonError | TimeoutError) -> str:
    if isinstance(error, BatonError):
        return f"{error.code}: {error.message}"
    return f"no end within {ANSWER_TIMEOUT_S:g} s"


def agrees(got: Answer, right: Answer, cut: bool) -> bool:
    """Whether it is the right answer; if `cut`, a beginning of it is enough."""
    if not cut:
        return got == right
    return all(
        choice.tokens == whole.tokens[: len(choice.tokens)] and whole.text.startswith(choice.text)
        for choice, whole in zip(got, right, strict=False)
    )
