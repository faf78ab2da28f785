"""The openai package and gRPC stubs against real processes: split answers equal co-located ones."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster.conftest import Cluster, ClusterFactory
from tests.models import make_tiny_model

pytestmark = pytest.mark.cluster

MESSAGES: Any = [{"role": "user", "content": "Prefill computes the prompt. And decode?"}]
PROMPT = "def fibonacci(n):"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cluster(model_dir: Path, start_cluster: ClusterFactory) -> Iterator[Cluster]:
    with start_cluster(str(model_dir), "--dtype", "float32", "--num-blocks", "48") as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat_streams_what_it_answers_at_once(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_the_second_time_the_prompt_is_cached(client: openai.OpenAI) -> None:
    prompt = [7 + i % 300 for i in range(100)]  # three full blocks of 32, and four tokens
    cached = []
    for _ in range(2):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=4)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 100
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 96]


def test_logprobs_of_both_workers_tokens(client: openai.OpenAI) -> None:
    """The first token's come from the prefill worker, the others' from the decode worker."""
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=6,
        temperature=0,
        logprobs=3,
        extra_body={"ignore_eos": True},
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 6
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(top.values()), abs=1e-6)  # greedy takes the best


def test_answers_of_one_request_differ_and_repeat_by_seed(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "n": 3, "seed": 11}
    first = client.completions.create(**options)
    again = client.completions.create(**options)
    texts = [choice.text for choice in first.choices]
    assert [choice.text for choice in again.choices] == texts
    assert len(set(texts)) == 3
    single = client.completions.create(**{**options, "n": 1, "seed": 12})
    assert single.choices[0].text == texts[1]


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, cluster: Cluster) -> None:
    options: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[5:8]
    short = client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True})
    assert short.choices[0].text == text[: text.index(stop)]
    assert short.choices[0].finish_reason == "stop"
    cluster.assert_idle()


async def test_grpc_gives_the_same_answer(cluster: Cluster, client: openai.OpenAI) -> None:
    text = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=16, temperature=0
    ).choices[0].text  # fmt: skip
    async with grpc.aio.insecure_channel(cluster.grpc) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(
            model="tiny",
            text=PROMPT,
            sampling=inference_pb2.SamplingOptions(max_tokens=16, temperature=0.0),
        )
        messages = [message async for message in stub.Generate(request, timeout=60)]
    assert "".join(message.text for message in messages) == text
    assert messages[-1].usage.prompt_tokens > 0


BAD: dict[str, tuple[dict[str, Any], str | None]] = {
    "longer than the context": ({"prompt": [5] * 3000}, "prompt"),
    "more than the pool": ({"prompt": [5] * 1600, "max_tokens": 8}, None),
    "token id out of range": ({"prompt": [384]}, "prompt"),
    "negative": ({"prompt": "x", "temperature": -1}, "temperature"),
    "unknown field": ({"prompt": "x", "tempreature": 1}, "tempreature"),
    "10,000 stop strings": ({"prompt": "x", "stop": ["y"] * 10_000}, "stop"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_leaves_nothing(cluster: Cluster, name: str) -> None:
    fields, param = BAD[name]
    response = cluster.post("/v1/completions", {"model": "tiny", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"]
    assert param is None or error["param"] == param
    cluster.assert_idle()


def test_clients_that_vanish_free_every_block(cluster: Cluster) -> None:
    """Some before the first token, some in the middle of the handoff, some while decoding."""
    body = {"model": "tiny", "max_tokens": 500, "ignore_eos": True, "stream": True}

    def vanish(number: int) -> None:
        prompt = [5 + (number + i) % 300 for i in range(200)]
        with (
            httpx.Client(base_url=cluster.url, trust_env=False, timeout=60) as client,
            client.stream("POST", "/v1/completions", json={**body, "prompt": prompt}) as stream,
        ):
            for count, _ in enumerate(stream.iter_lines()):
                if count >= number:
                    return

    threads = [threading.Thread(target=vanish, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    cluster.assert_idle()


def test_the_only_decode_worker_dies_and_the_stream_goes_on_at_its_next_life(
    model_dir: Path, start_cluster: ClusterFactory
) -> None:
    with start_cluster(str(model_dir), "--dtype", "float32") as cluster:
        undisturbed = asyncio.run(_stream(cluster))
        (decode,) = [w for w in cluster.status()["workers"] if w["role"] == "decode"]
        events = asyncio.run(_stream(cluster, kill_after=10, pid=decode["pid"]))
        assert not any('"error"' in event for event in events), events[-3:]
        assert _text(events) == _text(undisturbed)
        assert cluster.get("/ready").status_code == 200
        (restarted,) = [w for w in cluster.status()["workers"] if w["role"] == "decode"]
        assert restarted["pid"] != decode["pid"]


async def _stream(cluster: Cluster, kill_after: int = 0, pid: int = 0) -> list[str]:
    """The events of a long answer; SIGKILL of `pid` after so many of them."""
    body = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 1000,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    events: list[str] = []
    async with (
        httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=90) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if len(events) == kill_after:
                    os.kill(pid, signal.SIGKILL)
    return events


def _text(events: list[str]) -> str:
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
