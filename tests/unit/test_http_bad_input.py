"""Bad input over HTTP: each a clear error in OpenAI's shape, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from baton.types.fleet import Role
from conductor.openai import ChatBody, CompletionBody, DetokenizeBody
from tests.fake_worker import FakeCluster, fake_server, say

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with fake_server() as cluster:
        yield cluster


async def send(
    cluster: FakeCluster, content: bytes, path: str = "/v1/completions", method: str = "POST"
) -> httpx.Response:
    async with httpx.AsyncClient(
        base_url=cluster.url, trust_env=False, verify=False, timeout=20
    ) as client:
        return await client.request(method, path, content=content)


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b"[" * 5000,
    ],
)
async def test_bodies_that_are_no_json_object(cluster: FakeCluster, content: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        error = error_of(await send(cluster, content, path))
        assert error["type"] == "invalid_request_error"


COMPLETION_CASES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"text": "x"}}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [259]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[1], [10**30]]}, "prompt"),
    ({"prompt": "x" * 512}, "prompt"),
    ({"prompt": ["x"] * 129}, "prompt"),
    ({"prompt": [[1]] * 129}, "prompt"),
    ({"model": 1}, "model"),
    ({"model": None}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 512}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.0}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty"),  # by fuzzing: it made logits infinite
    ({"seed": 2**64}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x" * 257]}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop": 1}, "stop"),
    ({"stop_token_ids": [300]}, "stop_token_ids"),
    ({"stop_token_ids": list(range(200))}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": "a"}}, "logit_bias.1"),
    ({"logit_bias": []}, "logit_bias"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"priority": 2**31}, "priority"),
    ({"cache_salt": "x" * 257}, "cache_salt"),
    ({"cache_pin_s": 0}, "cache_pin_s"),
    ({"cache_pin_s": -1}, "cache_pin_s"),
    ({"cache_pin_s": 86_400.5}, "cache_pin_s"),
    ({"cache_pin_s": "60"}, "cache_pin_s"),
    ({"cache_pin_s": True}, "cache_pin_s"),
    ({"request_id": "has space"}, "request_id"),
    ({"request_id": ""}, "request_id"),
    ({"request_id": "x\r\ny"}, "request_id"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"echo": True}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
    ({"tools": [{}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": MESSAGES}, "messages"),
    ({"tempreature": 1}, "tempreature"),
]


async def test_bad_fields_of_completions_are_named(cluster: FakeCluster) -> None:
    for change, param in COMPLETION_CASES:
        body = {"model": "tiny", "prompt": "hello"} | change
        error = error_of(await send(cluster, json.dumps(body).encode()))
        assert error["param"] == param, (change, error)
        assert error["type"] == "invalid_request_error"
    assert not cluster.workers["decode-0"].tasks  # nothing of all this reached a worker


CHAT_CASES: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"prompt": "x"}, "prompt"),
    ({"echo": False}, "echo"),
]


async def test_bad_fields_of_chats_are_named(cluster: FakeCluster) -> None:
    for change, param in CHAT_CASES:
        body = {"model": "tiny", "messages": MESSAGES} | change
        error = error_of(await send(cluster, json.dumps(body).encode(), "/v1/chat/completions"))
        assert error["param"] == param, (change, error)
    assert not cluster.workers["decode-0"].tasks


async def test_messages_say_what_is_allowed(cluster: FakeCluster) -> None:
    async def message(**change: Any) -> str:
        body = {"model": "tiny", "prompt": "hello"} | change
        return str(error_of(await send(cluster, json.dumps(body).encode()))["message"])

    assert "at most 16 are allowed" in await message(stop=["x"] * 10_000)
    assert "the vocabulary is 0 to 258" in await message(prompt=[9999])
    assert "the context is 512 tokens" in await message(prompt="x" * 600)
    assert "only 507 of the context's 512" in await message(max_tokens=510)
    assert "unknown field colour" in await message(colour="red")
    assert "missing" in str(error_of(await send(cluster, b'{"model": "tiny"}'))["message"])


async def test_unknown_model_is_404(cluster: FakeCluster) -> None:
    for path in ("/v1/completions", "/tokenize"):
        error = error_of(await send(cluster, b'{"model": "gpt", "prompt": "x"}', path), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "'tiny'" in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "messages": MESSAGES}, "prompt"),
        ({}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"messages": [{"role": "bad", "content": "x"}]}, "messages.0.role"),
        ({"messages": []}, "messages"),
        ({"prompt": "x", "other": 1}, "other"),
    ],
)
async def test_bad_tokenize_bodies(cluster: FakeCluster, body: dict[str, Any], param: str) -> None:
    error = error_of(await send(cluster, json.dumps(body).encode(), "/tokenize"))
    assert error["param"] == param


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"tokens": [1]}])
async def test_an_empty_model_is_no_model(cluster: FakeCluster, body: dict[str, Any]) -> None:
    """Found by fuzzing: it was taken for one that is left out."""
    path = "/tokenize" if "prompt" in body else "/detokenize"
    for model, status in ((None, 200), ("tiny", 200), ("", 404), ("other", 404)):
        raw = json.dumps(body | {"model": model}).encode()
        assert (await send(cluster, raw, path)).status_code == status


async def test_bad_detokenize_bodies(cluster: FakeCluster) -> None:
    for tokens in ([-1], [10**6], ["a"], None, [1.5]):
        body = json.dumps({"tokens": tokens}).encode()
        assert "tokens" in error_of(await send(cluster, body, "/detokenize"))["param"]


async def test_oversized_bodies_are_413() -> None:
    async with fake_server(max_body_bytes=1000) as cluster:
        body = json.dumps({"model": "tiny", "prompt": "x" * 2000}).encode()
        error = error_of(await send(cluster, body), 413)
        assert error["code"] == "body_too_large"

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"x" * 200

        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            response = await client.post(f"{cluster.url}/v1/completions", content=chunks())
        error_of(response, 413)


async def test_unknown_paths_and_methods(cluster: FakeCluster) -> None:
    error = error_of(await send(cluster, b"", "/v1/nothing"), 404)
    assert error["code"] == "not_found"
    error = error_of(await send(cluster, b"", "/v1/completions", "GET"), 405)
    assert error["code"] == "method_not_allowed"
    assert error_of(await send(cluster, b"", "/health", "DELETE"), 405)


async def test_a_prompt_that_can_never_fit_the_pool() -> None:
    async with fake_server(prefill=0, decode=0) as cluster:
        await cluster.add(Role.DECODE, "decode-0", say("ok"), num_blocks=2)
        body = {"model": "tiny", "prompt": "x" * 40}
        error = error_of(await send(cluster, json.dumps(body).encode()))
        assert error["param"] == "prompt"
        assert error["code"] == "context_length_exceeded"
        assert "32 tokens" in error["message"]
        assert "--kv-memory-mib" in error["message"]
        assert (await send(cluster, b'{"model": "tiny", "prompt": "x"}')).status_code == 200


async def test_a_client_that_stops_in_the_middle_of_its_body(cluster: FakeCluster) -> None:
    host, _, port = cluster.http.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    response = await send(cluster, b'{"model": "tiny", "prompt": "x"}')
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", "10", 'max_tokens must be a whole number, not "10"'),
        ("max_tokens", 2.5, "max_tokens must be a whole number, not 2.5"),
        ("max_tokens", True, "max_tokens must be a whole number, not true"),
        ("temperature", [1], "temperature must be a number, not [1]"),
        ("stream", 1, "stream must be true or false, not 1"),
        ("stop", {"a": 1}, 'stop must be a string or a list of strings, not {"a":1}'),
        ("stop", ["a", None], "stop.1 must be a string, not null"),
        ("stream_options", [], "stream_options must be an object, not []"),
        ("prompt", 5, "prompt must be a string, a list of strings, a list of token ids or "),
        ("user", 5, "user must be a string, not 5"),
    ],
)
async def test_wrong_types_are_told_in_words(
    cluster: FakeCluster, field: str, value: Any, message: str
) -> None:
    body = {"model": "tiny", "prompt": "x", field: value}
    error = error_of(await send(cluster, json.dumps(body).encode()))
    assert error["message"].startswith(message)


async def test_a_content_part_of_another_kind_is_told_the_right_form(cluster: FakeCluster) -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": [part]}]}
    response = await send(cluster, json.dumps(body).encode(), "/v1/chat/completions")
    error = error_of(response)
    assert error["param"] == "messages.0.content"
    assert '{"type": "text", "text": …}' in error["message"]
    assert "{{" not in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_not_json_name_their_field(
    cluster: FakeCluster, number: str
) -> None:
    content = f'{{"model": "tiny", "prompt": "x", "top_p": {number}, "n": 1}}'.encode()
    error = error_of(await send(cluster, content))
    assert error["param"] == "top_p"
    assert f'"top_p": {number}' in error["message"]


async def test_messages_do_not_repeat_long_input(cluster: FakeCluster) -> None:
    long = "x" * 100_000
    bodies: list[dict[str, Any]] = [
        {"model": long, "prompt": "x"},
        {"model": "tiny", "prompt": "x", long: 1},
        {"model": "tiny", "prompt": "x", "max_tokens": long},
        {"model": "tiny", "prompt": "x", "response_format": {"type": long}},
    ]
    for body in bodies:
        response = await send(cluster, json.dumps(body).encode())
        assert response.status_code in (400, 404)
        assert len(response.content) < 600
    chat = {"model": "tiny", "messages": [{"role": long, "content": "x"}]}
    response = await send(cluster, json.dumps(chat).encode(), "/v1/chat/completions")
    assert error_of(response)["param"] == "messages.0.role"
    assert len(response.content) < 600


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"stop": [1] * 100_000}),
        ("/v1/completions", {"stop_token_ids": ["a"] * 100_000}),
        ("/v1/completions", {"logit_bias": {str(i): "a" for i in range(100_000)}}),
        ("/v1/completions", {f"field{i}": 1 for i in range(100_000)}),
        ("/v1/chat/completions", {"messages": [1] * 100_000}),
        ("/v1/chat/completions", {"messages": [{f"field{i}": 1 for i in range(100_000)}]}),
        ("/detokenize", {"tokens": ["a"] * 100_000}),
    ],
)
async def test_a_body_full_of_mistakes_costs_no_more_than_one(
    path: str, body: dict[str, Any]
) -> None:
    """Else one client could stall all others: a complaint is an object of a kilobyte."""
    classes: dict[str, type[BaseModel]] = {
        "/v1/completions": CompletionBody,
        "/v1/chat/completions": ChatBody,
        "/detokenize": DetokenizeBody,
    }
    with pytest.raises(ValidationError) as caught:
        classes[path].model_validate(body)
    assert caught.value.error_count() < 10


async def test_probes_may_ask_by_head_and_paths_are_exact(cluster: FakeCluster) -> None:
    for path in ("/health", "/ready"):
        assert (await send(cluster, b"", path, "HEAD")).status_code == 200
    error = error_of(await send(cluster, b"{}", "/v1/completions/"), 404)
    assert "/v1/completions/" in error["message"]
