"""The real `openai` package against a conductor with fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import openai
import pytest

from baton.errors import Overloaded
from conductor.http_errors import error_response
from tests.fake_worker import FakeCluster, Scripts, echo, fake_server, say, wait_for

HELLO = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def openai_client(
    script: Scripts = echo, **config: object
) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeCluster]]:
    async with (
        fake_server(script, **config) as cluster,  # type: ignore[arg-type]
        openai.AsyncOpenAI(
            base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=20
        ) as client,
    ):
        yield client, cluster


async def test_chat() -> None:
    async with openai_client(say("hi there")) as (client, _):
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, n=2)
        assert [choice.message.content for choice in answer.choices] == ["hi there"] * 2
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 18
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_stream_with_usage() -> None:
    async with openai_client(say("h🎼i", cached_tokens=2)) as (client, _):
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "h🎼i"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2


async def test_completions_and_token_ids() -> None:
    async with openai_client() as (client, _):
        answer = await client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=5)
        assert [choice.text for choice in answer.choices] == ["a", "b"]
        answer = await client.completions.create(model="tiny", prompt=[104, 105])
        assert answer.choices[0].text == "hi"
        stream = await client.completions.create(model="tiny", prompt="hey", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "hey"


async def test_logprobs() -> None:
    async with openai_client(say("é")) as (client, _):
        answer = await client.chat.completions.create(
            model="tiny", messages=HELLO, logprobs=True, top_logprobs=2
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert bytes(b for entry in logprobs.content for b in entry.bytes or ()) == "é".encode()
        assert [len(entry.top_logprobs) for entry in logprobs.content] == [2, 2]
        legacy = await client.completions.create(model="tiny", prompt="x", logprobs=1)
        assert legacy.choices[0].logprobs is not None
        assert legacy.choices[0].logprobs.token_logprobs == [-0.5, -0.5]


async def test_models() -> None:
    async with openai_client() as (client, _):
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).owned_by == "baton"


async def test_extra_fields_of_vllm_s_users() -> None:
    async with openai_client() as (client, cluster):
        extra = {"top_k": 3, "min_p": 0.1, "ignore_eos": True, "cache_salt": "s"}
        await client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body=extra)
        assert cluster.workers["decode-0"].tasks[0].sampling.top_k == 3


async def test_errors_become_the_package_s_exceptions() -> None:
    async with openai_client(say("x", hang_at=0), max_queue=1) as (client, cluster):
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="tiny", prompt="x", temperature=9)
        assert bad.value.param == "temperature"
        assert bad.value.code == "invalid_request_error"
        with pytest.raises(openai.NotFoundError, match="gpt"):
            await client.completions.create(model="gpt", prompt="x")
        running = asyncio.create_task(client.completions.create(model="tiny", prompt="x"))
        await wait_for(lambda: cluster.conductor.running == 1)
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="tiny", prompt="x")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_an_error_in_mid_stream_is_raised() -> None:
    async with openai_client(say("abc", error_at=2)) as (client, _):
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="a bug"):
            [chunk async for chunk in stream]


async def test_closing_the_stream_cancels_the_request() -> None:
    async with openai_client(say("abc", hang_at=2)) as (client, cluster):
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        async for _ in stream:
            break
        await stream.close()
        await cluster.check_nothing_left()


async def test_wrong_api_key() -> None:
    async with openai_client(api_key=("right",)) as (client, _):
        with pytest.raises(openai.AuthenticationError):
            await client.completions.create(model="tiny", prompt="x")
        answer = await client.with_options(api_key="right").completions.create(
            model="tiny", prompt="x"
        )
        assert answer.choices[0].text == "x"


async def test_who_is_refused_for_load_asks_again_when_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, pauses = 0, list[float]()

    def answer(_request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked > 1:
            return httpx.Response(200, json={"id": "x", "choices": []})
        told = error_response(Overloaded("too much to do", retry_after_s=7.3))
        return httpx.Response(
            told.status_code, headers=dict(told.headers), content=bytes(told.body)
        )

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("anyio.sleep", pause)
    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http,
        openai.AsyncOpenAI(base_url="http://x/v1", api_key="none", http_client=http) as client,
    ):
        await client.completions.create(model="tiny", prompt="a")
    assert pauses == [pytest.approx(7.3)]
