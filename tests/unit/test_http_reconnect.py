"""Streams that break over HTTP and gRPC: the rest comes with the last event's id, from anywhere."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from baton.v1 import inference_pb2 as pb
from tests.fake_worker import FakeCluster, fake_server, say
from tests.unit.test_grpc_inference import failure, generate
from tests.unit.test_http_api import client_of

TEXT = "one € two STOP three"


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with fake_server(say(TEXT)) as cluster:
        yield cluster


@dataclass(frozen=True)
class Event:
    id: str
    data: Any


async def post(
    cluster: FakeCluster, path: str, body: dict[str, Any], last: str | None = None
) -> httpx.Response:
    headers = {} if last is None else {"Last-Event-ID": last}
    async with client_of(cluster) as client:
        return await client.post(path, json={"model": "tiny"} | body, headers=headers)


async def stream(
    cluster: FakeCluster, path: str, body: dict[str, Any], last: str | None = None
) -> list[Event]:
    response = await post(cluster, path, body | {"stream": True}, last)
    assert response.status_code == 200, response.text
    *blocks, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    events = []
    for block in blocks:
        first, second = block.split("\n")
        event = Event(first.removeprefix("id: "), json.loads(second.removeprefix("data: ")))
        events.append(event)
    return events


def shown(events: list[Event]) -> dict[int, tuple[str, list[str], list[int], list[float]]]:
    """Of each answer: text, ends, token ids and log-probabilities."""
    answers: dict[int, tuple[str, list[str], list[int], list[float]]] = {}
    for event in events:
        for choice in event.data["choices"]:
            text, ends, ids, logprobs = answers.get(choice["index"], ("", [], [], []))
            text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            ends += [choice["finish_reason"]] if choice["finish_reason"] else []
            ids += choice.get("token_ids") or []
            logprobs += (choice.get("logprobs") or {}).get("token_logprobs") or []
            answers[choice["index"]] = (text, ends, ids, logprobs)
    return answers


COMPLETION: dict[str, Any] = {"prompt": "x", "max_tokens": 40}
BODIES = {
    "plain": ("/v1/completions", COMPLETION),
    "stop string": ("/v1/completions", COMPLETION | {"stop": ["STOP"]}),
    "held until the end": ("/v1/completions", COMPLETION | {"stop": ["three times"]}),
    "length": ("/v1/completions", COMPLETION | {"max_tokens": 6}),
    "everything": (
        "/v1/completions",
        COMPLETION | {"logprobs": 1, "return_token_ids": True, "seed": 7},
    ),
    "usage": ("/v1/completions", COMPLETION | {"stream_options": {"include_usage": True}}),
    "several": ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "max_tokens": 9}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
}


@pytest.mark.parametrize("kind", BODIES)
async def test_a_stream_that_breaks_anywhere_goes_on_exactly_there(
    cluster: FakeCluster, kind: str
) -> None:
    path, body = BODIES[kind]
    whole = await stream(cluster, path, body)
    usage = whole[-1].data.get("usage")
    for cut in range(1, len(whole) + 1):
        rest = await stream(cluster, path, body, whole[cut - 1].id)
        assert shown(whole[:cut] + rest) == shown(whole), cut
        assert {event.data["id"] for event in rest} <= {whole[0].data["id"]}
        if usage is not None:
            assert rest[-1].data["usage"] == usage


async def test_ids_of_a_resumed_stream_can_be_used_again(cluster: FakeCluster) -> None:
    path, body = BODIES["plain"]
    whole = await stream(cluster, path, body)
    second = await stream(cluster, path, body, whole[3].id)
    third = await stream(cluster, path, body, second[4].id)
    assert shown(whole[:4] + second[:5] + third) == shown(whole)
    assert whole[-1].id == third[-1].id


@pytest.mark.parametrize(
    ("change", "last", "says"),
    [
        ({}, "nonsense", "not the id of an event"),
        ({"prompt": "other"}, None, "same body"),
        ({"cache_salt": "other"}, None, "same body"),
        ({"stream": False}, None, "only a stream"),
    ],
)
async def test_what_does_not_fit_is_refused(
    cluster: FakeCluster, change: dict[str, Any], last: str | None, says: str
) -> None:
    path, body = BODIES["plain"]
    whole = await stream(cluster, path, body)
    response = await post(cluster, path, {**body, "stream": True, **change}, last or whole[2].id)
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"]
    assert error["param"] == "Last-Event-ID"


async def test_grpc_streams_go_on_too(cluster: FakeCluster) -> None:
    sampling = pb.SamplingOptions(max_tokens=40, temperature=0.7)
    whole = await generate(cluster, sampling=sampling)
    for cut in range(1, len(whole) + 1):
        token = whole[cut - 1].resume_token
        rest = await generate(cluster, sampling=sampling, resume_token=token)
        joined = [*whole[:cut], *rest]
        assert "".join(m.text for m in joined) == TEXT
        assert [i for m in joined for i in m.token_ids] == [i for m in whole for i in m.token_ids]
        assert [m.finish_reason for m in joined if m.finish_reason] == ["stop"]
        assert rest[-1].usage == whole[-1].usage
    tasks = cluster.workers["decode-0"].tasks
    assert len({task.sampling.seed for task in tasks}) == 1  # the one that was drawn first
    token = whole[0].resume_token
    _, _, param, _ = await failure(cluster, text="another", sampling=sampling, resume_token=token)
    assert param == "Last-Event-ID"
