"""Clients that know nothing of baton: OpenAI's SDK behind a load balancer. It asks again, twice at
most, while an answer has not begun; an answer that breaks off is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import openai

from baton.client.http import Client, Prompt
from bench.chaos.clients import ANSWER_TIMEOUT_S, Asking

_READY_S = 2.0  # within which an address that is ready says so
_RETRIES = 2  # the SDK's own number; it would ask the same address
_PAUSE_S = 0.5  # the SDK's first


class Balancer:
    """Names the next address that is ready, as load balancers know them. Close it."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._clients = [Client(url, _READY_S) for url in urls]
        self._turn = itertools.count()

    async def choose(self) -> str:
        """Any of them when none is ready."""
        for _ in self._clients:
            client = self._clients[next(self._turn) % len(self._clients)]
            if await client.ready():
                return client.url
        return self._clients[0].url

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))


@dataclass(slots=True)
class PlainAsking(Asking):
    """One request of such a client."""

    sdk: openai.AsyncOpenAI = field(kw_only=True)
    balancer: Balancer = field(kw_only=True)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self.began = loop.time()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._read(await self._begin(self.question.as_prompt()))
        except openai.OpenAIError as error:
            self.error = f"{type(error).__name__}: {error}"
        except httpx.HTTPError as error:  # of a body that broke off: the SDK does not wrap these
            self.error = f"the answer broke off: {error!r}"
        except TimeoutError:
            self.error = f"no end within {ANSWER_TIMEOUT_S:g} s"
        finally:
            self.ended = loop.time()

    async def _begin(self, prompt: Prompt) -> openai.AsyncStream[openai.types.Completion]:
        for left in reversed(range(_RETRIES + 1)):
            sdk = self.sdk.with_options(base_url=await self.balancer.choose() + "/v1")
            try:
                return await sdk.completions.create(
                    model="demo",
                    prompt=[token for token in prompt.content if isinstance(token, int)],
                    max_tokens=prompt.max_tokens,
                    stream=True,
                    extra_body=dict(prompt.options),
                )
            except (openai.APIConnectionError, openai.InternalServerError):
                if not left:
                    raise
                await asyncio.sleep(_PAUSE_S)
        raise AssertionError  # the loop returns or raises

    async def _read(self, chunks: openai.AsyncStream[openai.types.Completion]) -> None:
        async with chunks:
            async for chunk in chunks:
                for choice in chunk.choices:
                    self.tokens += (choice.model_extra or {}).get("token_ids") or ()
