"""The HTTP API with fake workers: answers, streams, usage, log-probabilities, fleet, metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from baton.errors import NoWorker
from baton.types.fleet import Role
from baton.types.request import FinishReason, WireError
from tests.fake_worker import EOS, FakeCluster, Script, fake_server, say, wait_for


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with fake_server() as cluster:
        yield cluster


def client_of(cluster: FakeCluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, trust_env=False, verify=False, timeout=20)


async def post(cluster: FakeCluster, path: str, **body: Any) -> httpx.Response:
    async with client_of(cluster) as client:
        return await client.post(path, json={"model": "tiny"} | body)


async def complete(cluster: FakeCluster, **body: Any) -> dict[str, Any]:
    response = await post(cluster, "/v1/completions", **body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def stream(cluster: FakeCluster, path: str, **body: Any) -> tuple[list[Any], str]:
    """The events of a stream and the last line."""
    response = await post(cluster, path, stream=True, **body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    sent = response.text.splitlines()
    lines = [line.removeprefix("data: ") for line in sent if line.startswith("data:")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    return events, lines[-1]


async def test_completion(cluster: FakeCluster) -> None:
    response = await post(cluster, "/v1/completions", prompt="hello", max_tokens=50)
    body = response.json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"] == [
        {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert response.headers["x-request-id"] == body["id"]
    assert body["id"].startswith("cmpl-")


async def test_completions_default_to_sixteen_tokens(cluster: FakeCluster) -> None:
    body = await complete(cluster, prompt="x" * 100)
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["ab", "cd"], ["ab", "cd"]),
        ([104, 105], ["hi"]),
        ([[104], [105, 106]], ["h", "ij"]),
        ("é🎼", ["é🎼"]),
    ],
)
async def test_every_form_of_prompt(cluster: FakeCluster, prompt: Any, texts: list[str]) -> None:
    body = await complete(cluster, prompt=prompt)
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))


async def test_n_choices_of_several_prompts(cluster: FakeCluster) -> None:
    body = await complete(cluster, prompt=["a", "bc"], n=2)
    assert [choice["text"] for choice in body["choices"]] == ["a", "a", "bc", "bc"]
    assert body["usage"]["prompt_tokens"] == 3


async def test_chat_renders_the_template(cluster: FakeCluster) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    response = await post(cluster, "/v1/chat/completions", messages=messages)
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    message = body["choices"][0]["message"]
    # The fake echoes the prompt up to its first end-of-sequence token, which ends the answer.
    assert message == {"role": "assistant", "content": "system\nbe brief", "refusal": None}
    prompt = bytes(t for t in cluster.workers["decode-0"].tasks[0].prompt if t < 256)
    assert prompt == b"system\nbe briefuser\nh\niassistant\n"


async def test_fields_reach_the_workers(cluster: FakeCluster) -> None:
    await complete(
        cluster, prompt="x", temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=-1, max_tokens=7,
        min_tokens=2, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
        logit_bias={"65": -100, "66": 2.5}, stop_token_ids=[10, 10], ignore_eos=True, priority=-3,
        cache_salt="tenant", cache_pin_s=60, user="somebody", request_id="mine-1", logprobs=0,
    )  # fmt: skip
    task = cluster.workers["decode-0"].tasks[0]
    assert task.attempt.request_id.startswith("mine-1~")
    assert (task.priority, task.cache_salt, task.cache_pin_s) == (-3, "tenant", 60.0)
    sampling = task.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    assert (sampling.min_p, sampling.seed) == (0.1, 2**64 - 1)
    assert (sampling.max_tokens, sampling.min_tokens) == (7, 2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.0)
    assert sampling.repetition_penalty == 1.5
    assert sampling.logit_bias == ((65, -100.0), (66, 2.5))
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((10,), True)
    assert sampling.logprobs == 0


async def test_null_means_not_given(cluster: FakeCluster) -> None:
    body = await complete(
        cluster, prompt="x", max_tokens=None, stop=None, tools=None, suffix=None, stream=None,
        response_format={"type": "text"}, logit_bias=None, best_of=None, echo=False, store=False,
        functions=[], metadata={},
    )  # fmt: skip
    assert body["choices"][0]["text"] == "x"


async def test_stream_of_a_completion(cluster: FakeCluster) -> None:
    events, last = await stream(cluster, "/v1/completions", prompt="hé🎼!")
    assert last == "[DONE]"
    texts = [event["choices"][0]["text"] for event in events]
    assert "".join(texts) == "hé🎼!"
    assert not any("\ufffd" in text for text in texts)
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[-1] == "stop"
    assert set(reasons[:-1]) == {None}
    assert "usage" not in events[-1]


async def test_stream_of_a_chat_with_usage(cluster: FakeCluster) -> None:
    events, last = await stream(
        cluster,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        stream_options={"include_usage": True},
        n=2,
    )
    assert last == "[DONE]"
    assert [event["choices"][0]["delta"] for event in events[:2]] == [
        {"role": "assistant", "content": ""}
    ] * 2
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 2 * len("_user\nhi_")
    assert all(event["usage"] is None for event in events[:-1])
    for index in range(2):
        mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "user\nhi"
        assert [c["finish_reason"] for c in mine if c["finish_reason"]] == ["stop"]
    assert len({event["id"] for event in events}) == 1


async def test_usage_in_every_chunk(cluster: FakeCluster) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events, _ = await stream(cluster, "/v1/completions", prompt="abc", stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 4


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_token_ids_of_an_answer(cluster: FakeCluster, path: str) -> None:
    ask: dict[str, Any] = {"prompt": "hé!", "return_token_ids": True}
    if "chat" in path:
        ask = {"messages": [{"role": "user", "content": "hé!"}], "return_token_ids": True}
    whole = (await post(cluster, path, **ask)).json()
    ids = whole["choices"][0]["token_ids"]
    assert len(ids) == whole["usage"]["completion_tokens"]
    assert ids[-1] == EOS
    events, _ = await stream(cluster, path, **ask)
    parts = [choice.get("token_ids", []) for event in events for choice in event["choices"]]
    assert [token for part in parts for token in part] == ids


async def test_completion_logprobs() -> None:
    async with fake_server(say("aé")) as cluster:
        body = await complete(cluster, prompt="x", logprobs=2)
        logprobs = body["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
        assert logprobs["token_logprobs"] == [-0.5] * 3
        assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
        assert logprobs["text_offset"] == [0, 1, 1]
        events, _ = await stream(cluster, "/v1/completions", prompt="x", logprobs=2)
        parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
        assert [name for part in parts for name in part["tokens"]] == logprobs["tokens"]


async def test_chat_logprobs() -> None:
    async with fake_server(say("aé")) as cluster:
        response = await post(
            cluster, "/v1/chat/completions", logprobs=True, top_logprobs=1,
            messages=[{"role": "user", "content": "hi"}],
        )  # fmt: skip
        content = response.json()["choices"][0]["logprobs"]["content"]
        assert content[0] == {
            "token": "a",
            "logprob": -0.5,
            "bytes": [97],
            "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
        }
        assert [entry["bytes"] for entry in content[1:]] == [[0xC3], [0xA9]]
        assert content[1]["token"] == "\\xc3"


async def test_special_tokens_are_skipped_unless_wanted() -> None:
    def script(_task: object) -> Script:
        return Script((97, 257, 98), FinishReason.LENGTH)

    async with fake_server(script) as cluster:
        assert (await complete(cluster, prompt="x"))["choices"][0]["text"] == "ab"
        body = await complete(cluster, prompt="x", skip_special_tokens=False)
        assert body["choices"][0]["text"] == "a<|start|>b"


async def test_stop_strings_and_stop_tokens() -> None:
    async with fake_server(say("one two three")) as cluster:
        body = await complete(cluster, prompt="x", stop=["three", " two"], max_tokens=40)
        assert body["choices"][0] | {"logprobs": 0} == {
            "index": 0, "text": "one", "logprobs": 0, "finish_reason": "stop",
        }  # fmt: skip
        events, _ = await stream(cluster, "/v1/completions", prompt="x", stop="wo", max_tokens=40)
        assert "".join(event["choices"][0]["text"] for event in events) == "one t"


async def test_client_that_vanishes_mid_stream_frees_both_workers() -> None:
    async with fake_server(say("abcdef", hang_at=3)) as cluster:
        async with (
            client_of(cluster) as client,
            client.stream(
                "POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True}
            ) as response,
        ):
            async for line in response.aiter_lines():
                assert line.startswith("id: ")
                break
            assert cluster.conductor.running == 1
        await cluster.check_nothing_left()
        assert cluster.workers["decode-0"].cancelled


async def test_client_that_vanishes_before_the_answer_frees_both_workers() -> None:
    async with fake_server(say("abc", hang_at=0)) as cluster:
        task = asyncio.create_task(post(cluster, "/v1/completions", prompt="x"))
        await wait_for(lambda: all(worker.live for worker in cluster.workers.values()))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.check_nothing_left()


async def test_an_error_in_mid_stream_is_an_event_and_the_end() -> None:
    async with fake_server(say("abc", error_at=2)) as cluster:
        events, last = await stream(cluster, "/v1/completions", prompt="x")
        assert events[-1]["error"]["code"] == "internal_error"
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "ab"
        assert last != "[DONE]"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("worker_lost", 502),
        ("overloaded", 429),
        ("deadline_exceeded", 504),
        ("transport_error", 502),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_before_the_first_token_has_a_status(
    code: str, status: int, streamed: bool
) -> None:
    error = WireError(code, "something happened", retryable=False)
    async with fake_server(say("abc", error_at=0, error=error)) as cluster:
        response = await post(cluster, "/v1/completions", prompt="x", stream=streamed)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert response.json()["error"]["message"] == "something happened"
        assert ("retry-after" in response.headers) == (status == 429)


async def test_the_bound_gives_429_with_retry_after() -> None:
    async with fake_server(say("abc", hang_at=1), max_queue=1) as cluster:
        first = asyncio.create_task(post(cluster, "/v1/completions", prompt="x"))
        await wait_for(lambda: cluster.conductor.running == 1)
        response = await post(cluster, "/v1/completions", prompt="x")
        assert response.status_code == 429
        assert response.headers["retry-after"] in ("1", "2")
        milliseconds = int(response.headers["retry-after-ms"])
        assert 1000 <= milliseconds <= 1000 * int(response.headers["retry-after"])
        assert response.json()["error"]["type"] == "rate_limit_error"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_a_request_id_is_used_once_at_a_time() -> None:
    async with fake_server(say("abc", hang_at=1)) as cluster:
        first = asyncio.create_task(post(cluster, "/v1/completions", prompt="x", request_id="r"))
        await wait_for(lambda: cluster.conductor.running == 1)
        response = await post(cluster, "/v1/completions", prompt="x", request_id="r")
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "request_id"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await cluster.check_nothing_left()
        for worker in cluster.workers.values():
            worker.script = say("ok")
        response = await post(cluster, "/v1/completions", prompt="x", request_id="r")
        assert response.headers["x-request-id"] == "r"


async def test_health_ready_and_models() -> None:
    async with fake_server(prefill=0, decode=0) as cluster, client_of(cluster) as client:
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).status_code == 503
        response = await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "no_worker"
        await cluster.add(Role.DECODE, "decode-0", say("x"), num_blocks=2)
        assert (await client.get("/ready")).status_code == 200
        models = (await client.get("/v1/models")).json()
        assert models["data"][0]["id"] == "tiny"
        assert models["data"][0]["max_model_len"] == 32  # what the pool can hold
        assert (await client.get("/v1/models/tiny")).json() == models["data"][0]
        assert (await client.get("/v1/models/other")).status_code == 404


async def test_tokenize_and_detokenize(cluster: FakeCluster) -> None:
    response = await post(cluster, "/tokenize", prompt="hé")
    assert response.json() == {"tokens": list("hé".encode()), "count": 3, "max_model_len": 512}
    response = await post(cluster, "/tokenize", messages=[{"role": "user", "content": "a"}])
    assert response.json()["tokens"][:5] == [257, *b"user"]
    response = await post(cluster, "/detokenize", tokens=[*b"a\xff", EOS])
    assert response.json() == {"prompt": "a\ufffd<|end|>"}
    long = "x" * 5000
    response = await post(cluster, "/tokenize", prompt=long)
    assert response.json()["count"] == 5000


async def test_cluster_lists_every_process(cluster: FakeCluster) -> None:
    await complete(cluster, prompt="hello")
    async with client_of(cluster) as client:
        body = (await client.get("/cluster")).json()
    (conductor,) = body["conductors"]
    assert (conductor["name"], conductor["role"]) == ("conductor-0", "conductor")
    assert (conductor["state"], conductor["address"]) == ("live", cluster.http)
    decode, prefill = body["workers"]
    assert (decode["name"], decode["role"], decode["state"]) == ("decode-0", "decode", "live")
    assert (prefill["name"], prefill["pid"], prefill["address"]) == (
        "prefill-0", 4242, "prefill-0:1",
    )  # fmt: skip
    assert sum(decode["blocks"].values()) == decode["num_blocks"]
    assert body["stores"] == []


async def test_metrics_count_what_happened(cluster: FakeCluster) -> None:
    await complete(cluster, prompt="hello")
    await post(cluster, "/v1/completions", prompt="x", n=-1)
    async with client_of(cluster) as client:
        text = (await client.get("/metrics")).text
    for line in (
        'baton_requests_total{outcome="ok"} 1.0',
        'baton_requests_total{outcome="invalid_request_error"} 1.0',
        "baton_requests_running 0.0",
        "baton_prompt_tokens_total 5.0",
        "baton_output_tokens_total 6.0",
        "baton_ttft_seconds_count 1.0",
        "baton_tpot_seconds_count 1.0",
        "baton_e2e_seconds_count 1.0",
        'baton_workers{role="decode",state="live"} 1.0',
        'baton_worker_blocks{state="free",worker="decode-0"}',
    ):
        assert line in text


async def test_trace_of_a_request(cluster: FakeCluster) -> None:
    body = await complete(cluster, prompt="hello", request_id="seen")
    async with client_of(cluster) as client:
        trace = (await client.get("/trace/seen")).json()
        assert (trace["request_id"], trace["outcome"]) == ("seen", "ok")
        assert trace["output_tokens"] == body["usage"]["completion_tokens"]
        assert trace["cached_tokens"] == body["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert trace["attempts"][0]["decode"] == "decode-0"
        missing = await client.get("/trace/nobody")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "not_found"


async def test_a_request_goes_on_in_its_client_s_trace(cluster: FakeCluster) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    seen = {}
    async with client_of(cluster) as client:
        for name, parent in (("good", f"00-{trace_id}-b7ad6b7169203331-01"), ("bad", "00-1-2-01")):
            body = {"model": "tiny", "prompt": "x", "request_id": name}
            headers = {"traceparent": parent}
            (await client.post("/v1/completions", json=body, headers=headers)).raise_for_status()
            seen[name] = (await client.get(f"/trace/{name}")).json()["trace_id"]
    assert seen["good"] == trace_id
    task = cluster.workers["decode-0"].tasks[0]
    assert task.trace is not None
    assert (task.trace.trace_id, task.trace.sampled) == (trace_id, True)
    assert len(seen["bad"]) == 32
    assert seen["bad"] != trace_id


async def test_api_keys_guard_what_costs() -> None:
    async with fake_server(api_key=("k1", "k2")) as cluster, client_of(cluster) as client:
        body = {"model": "tiny", "prompt": "x"}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "k1"}):
            response = await client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        key = {"authorization": "Bearer k2"}
        assert (await client.post("/v1/completions", json=body, headers=key)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/health")).status_code == 200


async def test_draining_refuses_new_requests_and_finishes_running_ones() -> None:
    async with fake_server(say("abc", hang_at=2), drain_timeout=20.0) as cluster:
        first = asyncio.create_task(post(cluster, "/v1/completions", prompt="x"))
        await wait_for(lambda: cluster.conductor.running == 1)
        assert cluster.server is not None
        cluster.server.stop()
        await wait_for(lambda: cluster.conductor.admission.closed)
        response = await post(cluster, "/v1/completions", prompt="x")
        assert response.status_code == 503
        async with client_of(cluster) as client:
            assert (await client.get("/ready")).status_code == 503
        cluster.conductor.abort_all(NoWorker("enough"))
        assert (await first).status_code == 503


async def test_a_second_stop_does_not_wait_for_running_requests() -> None:
    async with fake_server(say("abc", hang_at=2), drain_timeout=1000.0) as cluster:
        first = asyncio.create_task(stream(cluster, "/v1/completions", prompt="x"))
        await wait_for(lambda: cluster.conductor.running == 1)
        assert cluster.server is not None
        cluster.server.stop()
        await wait_for(lambda: cluster.conductor.admission.closed)
        cluster.server.stop(drain_s=0.0)
        events, last = await first
        assert events[-1]["error"]["code"] == "no_worker"
        assert last != "[DONE]"


async def test_a_refused_request_does_not_touch_the_trace_of_the_running_one() -> None:
    async with fake_server(say("abc", hang_at=1)) as cluster:
        first = asyncio.create_task(post(cluster, "/v1/completions", prompt="x", request_id="r"))
        await wait_for(lambda: cluster.conductor.running == 1)
        assert (await post(cluster, "/v1/completions", prompt="x", request_id="r")).is_error
        timeline = cluster.conductor.traces.get("r")
        assert timeline is not None
        assert timeline.outcome == "running"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
