"""The API's document says what the server does: every path, every field, every range."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from conductor.openapi import make_document
from conductor.validate import Limits
from tests.fake_worker import FakeCluster, echo, fake_server

Json = dict[str, Any]
PATHS = {
    "CompletionBody": ("/v1/completions", {"model": "tiny", "prompt": "hi", "max_tokens": 4}),
    "ChatBody": (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "logprobs": True},
    ),
    "TokenizeBody": ("/tokenize", {"prompt": "hi"}),
    "DetokenizeBody": ("/detokenize", {"tokens": [1]}),
}
# What the document says in words: these fields have to fit others, or the context.
RELATED = ("context_length_exceeded", "min_tokens is", "differ: give one", "are more than")


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with fake_server(echo) as cluster, _client(cluster) as client:
        yield client


def _client(cluster: FakeCluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, trust_env=False, verify=False, timeout=20)


def value_schema(field: Json) -> Json:
    return next(part for part in field.get("anyOf", [field]) if part.get("type") != "null")


def edges(schema: Json) -> tuple[list[Any], list[Any]]:
    """Values that are just allowed, and just not."""
    whole, text, token = schema.get("type") == "integer", "x", 5
    good: list[Any] = []
    bad: list[Any] = []
    for name, sign in (("minimum", -1), ("maximum", 1)):
        if name in schema:
            good.append(schema[name])
            bad.append(schema[name] + sign * (1 if whole else 0.01))
    if "exclusiveMinimum" in schema:
        bad.append(schema["exclusiveMinimum"])
        good.append(schema["exclusiveMinimum"] + 0.01)
    if "maxLength" in schema:
        good.append(text * schema["maxLength"])
        bad.append(text * (schema["maxLength"] + 1))
    if schema.get("type") == "array" and "maxItems" in schema:
        good.append([token] * schema["maxItems"])
        bad.append([token] * (schema["maxItems"] + 1))
    if "pattern" in schema:
        good += ["a", "A.b_c:d-9"]
        bad += ["", "a b", "é", "-a", "x" * 129]
    if "enum" in schema:
        good += schema["enum"]
        bad.append("something else")
    return good, bad


async def test_every_range_is_the_one_that_is_checked(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    tried = 0
    for name, (path, body) in PATHS.items():
        for field, described in schemas[name]["properties"].items():
            good, bad = edges(value_schema(described))
            for value in good:
                answer = await client.post(path, json=body | {field: value})
                related = any(words in answer.text for words in RELATED)
                assert answer.status_code == 200 or related, (field, value, answer.text)
            for value in bad:
                answer = await client.post(path, json=body | {field: value})
                assert answer.status_code in (400, 404), (field, value)
                named = answer.json()["error"]["param"].partition(".")[0]
                assert named == field or (name, field) == ("ChatBody", "max_tokens"), (field, value)
            tried += len(good) + len(bad)
    assert tried > 150


async def test_every_shape_of_a_field_is_taken(client: httpx.AsyncClient) -> None:
    """Those with a validator of their own, of which the document is written by hand."""
    taken: dict[str, list[Any]] = {
        "prompt": ["a", ["a", "b"], [1, 2], [[1], [2, 3]]],
        "stop": [None, "x", ["x"], []],
        "logit_bias": [None, {}, {"5": -100, "6": 0.5}],
    }
    refused: dict[str, list[Any]] = {
        "prompt": ["", [], [[]], [""], [1, "a"], [1.5], [259], [[259]], ["a"] * 129, {}, 1, None],
        "stop": ["", [""], ["x" * 257], ["x"] * 17, 1, {}],
        "logit_bias": [{"x": 1}, {"5": 101}, {"-1": 1}, {"5": "a"}, []],
    }
    path, body = PATHS["CompletionBody"]
    for field, values in taken.items():
        for value in values:
            assert (await client.post(path, json=body | {field: value})).status_code == 200, value
    for field, values in refused.items():
        for value in values:
            assert (await client.post(path, json=body | {field: value})).status_code == 400, value


async def test_no_messages_are_not_allowed(client: httpx.AsyncClient) -> None:
    """Found by fuzzing: the document allowed an empty list to /tokenize."""
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    for name in ("ChatBody", "TokenizeBody"):
        assert value_schema(schemas[name]["properties"]["messages"])["minItems"] == 1
        path, body = PATHS[name]
        others = {field: value for field, value in body.items() if field != "prompt"}
        assert (await client.post(path, json=others | {"messages": []})).status_code == 400


async def test_the_document_has_every_path_and_nothing_else(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    for path, operations in paths.items():
        url = path.replace("{name}", "tiny").replace("{request_id}", "r")
        for method in ("get", "post"):
            status = (await client.request(method, url)).status_code
            assert (status != 405) == (method in operations), (method, path)
    assert len(paths) == 13


def test_only_guarded_paths_ask_for_a_key() -> None:
    limits = Limits("tiny", 259, 512)
    open_paths = {"/openapi.json", "/health", "/ready", "/metrics", "/cluster"}
    for path, operations in make_document(limits, with_key=True)["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == (path not in open_paths)
            assert ("401" in operation["responses"]) == (path not in open_paths)
    assert "securitySchemes" not in make_document(limits, with_key=False)["components"]


def test_one_document_does_not_change_another() -> None:
    first = make_document(Limits("a", 10, 512), with_key=False)
    make_document(Limits("b", 99, 512), with_key=False)
    assert first == make_document(Limits("a", 10, 512), with_key=False)
