"""The gRPC API: generated stubs, server reflection and health against fake workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.types.fleet import Role
from baton.types.request import WireError
from baton.types.trace import TraceContext
from baton.v1 import fleet_pb2, fleet_pb2_grpc, inference_pb2_grpc
from baton.v1 import inference_pb2 as pb
from tests.fake_worker import EOS, FakeCluster, fake_server, say, wait_for


@pytest.fixture
async def cluster() -> AsyncIterator[FakeCluster]:
    async with fake_server() as cluster:
        yield cluster


def channel_to(cluster: FakeCluster) -> grpc.aio.Channel:
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.aio.insecure_channel(cluster.grpc, options=options)


async def generate(
    cluster: FakeCluster, timeout: float = 20, metadata: Any = None, **fields: Any
) -> list[pb.GenerateResponse]:
    request = pb.GenerateRequest(**({"model": "tiny", "text": "hello"} | fields))
    async with channel_to(cluster) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        return [m async for m in stub.Generate(request, timeout=timeout, metadata=metadata)]


async def failure(cluster: FakeCluster, **fields: Any) -> tuple[grpc.StatusCode, str, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(cluster, **fields)
    trailing = dict(caught.value.trailing_metadata() or ())
    code, param = trailing.get("baton-error-code", ""), trailing.get("baton-error-param", "")
    return caught.value.code(), str(code), str(param), str(caught.value.details())


def text_of(messages: list[pb.GenerateResponse], index: int = 0) -> str:
    return "".join(message.text for message in messages if message.index == index)


async def test_generate_streams_text_ids_and_usage(cluster: FakeCluster) -> None:
    messages = await generate(cluster, text="hé", request_id="mine")
    assert text_of(messages) == "hé"
    assert [i for m in messages for i in m.token_ids] == [*"hé".encode(), EOS]
    assert {message.request_id for message in messages} == {"mine"}
    assert [m.finish_reason for m in messages if m.finish_reason] == ["stop"]
    usage = messages[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 4, 0)
    assert not any(message.HasField("usage") for message in messages[:-1])


async def test_prompts_of_ids_and_chats(cluster: FakeCluster) -> None:
    ids = {"text": None, "token_ids": pb.TokenIds(ids=b"abc")}
    assert text_of(await generate(cluster, **ids)) == "abc"
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    assert text_of(await generate(cluster, text=None, chat=chat)) == "user\nhi"


async def test_sampling_options_reach_the_workers(cluster: FakeCluster) -> None:
    sampling = pb.SamplingOptions(
        temperature=0, top_k=4, seed=-5, max_tokens=3, stop_token_ids=[9], logit_bias={7: -1.5}, n=2
    )
    options = {"priority": 4, "cache_salt": "salt", "cache_pin_s": 0.5}
    messages = await generate(cluster, sampling=sampling, **options)
    assert {message.index for message in messages} == {0, 1}
    task = cluster.workers["decode-0"].tasks[0]
    assert (task.priority, task.cache_salt, task.cache_pin_s) == (4, "salt", 0.5)
    assert (task.sampling.temperature, task.sampling.top_k) == (0.0, 4)
    assert task.sampling.seed == 2**64 - 5
    assert task.sampling.logit_bias == ((7, -1.5),)
    assert task.sampling.stop_token_ids == (9,)


async def test_a_request_goes_on_in_its_client_s_trace(cluster: FakeCluster) -> None:
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    metadata = (("traceparent", f"00-{trace_id}-{parent}-00"), ("tracestate", "a=1"))
    await generate(cluster, metadata=metadata, request_id="mine")
    timeline = cluster.conductor.traces.get("mine")
    assert timeline is not None
    assert timeline.tracing.caller == TraceContext(trace_id, parent, sampled=False, state="a=1")


async def test_details_with_logprobs(cluster: FakeCluster) -> None:
    messages = await generate(cluster, text="a", sampling=pb.SamplingOptions(logprobs=2))
    details = [detail for message in messages for detail in message.details]
    assert details[0].chosen.text == "a"
    assert details[0].chosen.logprob == -0.5
    assert [choice.token_id for choice in details[0].top] == [97, 98]
    assert len(details) == sum(len(message.token_ids) for message in messages)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, grpc.StatusCode.NOT_FOUND, "model"),
        ({"text": ""}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"text": None}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        ({"text": "x" * 600}, grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (
            {"text": None, "token_ids": pb.TokenIds(ids=[4_000_000_000])},
            grpc.StatusCode.INVALID_ARGUMENT,
            "prompt",
        ),
        (
            {"text": None, "chat": pb.ChatMessages(messages=[pb.ChatMessage(role="x")])},
            grpc.StatusCode.INVALID_ARGUMENT,
            "messages.0.role",
        ),
        ({"request_id": "a b"}, grpc.StatusCode.INVALID_ARGUMENT, "request_id"),
        ({"cache_pin_s": 0.0}, grpc.StatusCode.INVALID_ARGUMENT, "cache_pin_s"),
        ({"cache_pin_s": float("nan")}, grpc.StatusCode.INVALID_ARGUMENT, "cache_pin_s"),
    ],
)
async def test_bad_requests(
    cluster: FakeCluster, fields: dict[str, Any], status: grpc.StatusCode, param: str
) -> None:
    assert (await failure(cluster, **fields))[::2] == (status, param)
    assert not cluster.workers["decode-0"].tasks


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"logit_bias": {100_000: 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"n": -1}, "n"),
        ({"logprobs": 99}, "logprobs"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop_token_ids": [4_000_000_000]}, "stop_token_ids"),
    ],
)
async def test_bad_sampling_options(
    cluster: FakeCluster, options: dict[str, Any], param: str
) -> None:
    got = await failure(cluster, sampling=pb.SamplingOptions(**options))
    assert got[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert got[2] == param


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("worker_lost", grpc.StatusCode.UNAVAILABLE),
        ("internal_error", grpc.StatusCode.INTERNAL),
    ],
)
async def test_errors_of_workers(code: str, status: grpc.StatusCode) -> None:
    error = WireError(code, "it broke")
    async with fake_server(say("abc", error_at=1, error=error)) as cluster:
        assert (await failure(cluster))[:2] == (status, code)


async def test_no_worker_is_unavailable() -> None:
    async with fake_server(prefill=0, decode=0) as cluster:
        got = await failure(cluster)
        assert got[:2] == (grpc.StatusCode.UNAVAILABLE, "no_worker")


async def test_the_client_s_deadline_reaches_the_workers() -> None:
    async with fake_server(say("abc", hang_at=1)) as cluster:
        got = await failure(cluster, timeout=0.5)
        assert got[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        timeout_s = cluster.workers["decode-0"].tasks[0].timeout_s
        assert timeout_s is not None
        assert 0 < timeout_s <= 0.5
        await cluster.check_nothing_left()


async def test_cancelling_the_call_cancels_both_workers() -> None:
    async with fake_server(say("abc", hang_at=1)) as cluster, channel_to(cluster) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        call = stub.Generate(pb.GenerateRequest(model="tiny", text="x"))
        assert (await call.read()).text == "a"
        call.cancel()
        await cluster.check_nothing_left()


async def test_a_client_that_vanishes_frees_both_workers() -> None:
    async with fake_server(say("abc", hang_at=1)) as cluster:
        task = asyncio.create_task(generate(cluster))
        await wait_for(lambda: cluster.conductor.running == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.check_nothing_left()


async def test_tokenize_and_models(cluster: FakeCluster) -> None:
    async with channel_to(cluster) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        reply = await stub.Tokenize(pb.TokenizeRequest(model="tiny", text="hé"))
        assert (list(reply.token_ids), reply.max_model_len) == (list("hé".encode()), 512)
        models = await stub.ListModels(pb.ListModelsRequest())
        assert [(model.id, model.max_model_len) for model in models.models] == [("tiny", 512)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest(model="tiny"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest(model="no", text="x"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_api_keys() -> None:
    async with fake_server(api_key=("k",)) as cluster:
        assert (await failure(cluster))[0] is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", "Bearer k"),)
        assert text_of(await generate(cluster, metadata=metadata)) == "hello"


async def test_oversized_requests() -> None:
    async with fake_server(max_body_bytes=1000) as cluster:
        got = await failure(cluster, text="x" * 2000)
        assert got[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "body_too_large")


async def test_internal_services_need_the_cluster_token(cluster: FakeCluster) -> None:
    async with channel_to(cluster) as channel:
        stub = fleet_pb2_grpc.FleetStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Renew(fleet_pb2.RenewRequest(name="decode-0"))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        token = (("authorization", "Bearer secret"),)
        reply = await stub.Renew(fleet_pb2.RenewRequest(name="nobody"), metadata=token)
        assert not reply.accepted


async def test_reflection_describes_the_public_service(cluster: FakeCluster) -> None:
    async with channel_to(cluster) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest
        requests = [
            asked(list_services=""),
            asked(file_containing_symbol="baton.v1.Inference"),
        ]
        replies = [reply async for reply in stub.ServerReflectionInfo(iter(requests))]
        names = {service.name for service in replies[0].list_services_response.service}
        assert {"baton.v1.Inference", "grpc.health.v1.Health"} <= names
        assert "baton.v1.Fleet" not in names
        file = FileDescriptorProto.FromString(
            replies[1].file_descriptor_response.file_descriptor_proto[0]
        )
        methods = {method.name for service in file.service for method in service.method}
        assert methods == {"Generate", "Tokenize", "ListModels"}


@pytest.mark.parametrize(
    ("raw", "why"),
    [(b"\xff\xff\xff", "corrupt"), (b"\x0a\x04tiny\x12\x02\xff\xfe", "UTF-8")],
)
@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_messages_that_cannot_be_parsed(
    cluster: FakeCluster, method: str, raw: bytes, why: str
) -> None:
    async with channel_to(cluster) as channel:
        make = channel.unary_stream if method == "Generate" else channel.unary_unary
        call = make(
            f"/baton.v1.Inference/{method}",
            request_serializer=lambda data: data,
            response_deserializer=lambda data: data,
        )(raw, timeout=20)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "not a valid protobuf message" in await call.details()
        assert why in await call.details()
        assert dict(await call.trailing_metadata())["baton-error-code"] == "invalid_request_error"


async def test_long_names_do_not_break_the_status(cluster: FakeCluster) -> None:
    """gRPC bounds the size of a status, so a message must not repeat all of the input."""
    status, code, _, _ = await failure(cluster, model="x" * 100_000)
    assert (status, code) == (grpc.StatusCode.NOT_FOUND, "model_not_found")


async def test_health_knows_the_public_service(cluster: FakeCluster) -> None:
    async with channel_to(cluster) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="baton.v1.Inference")
        async for answer in stub.Watch(request, timeout=20):
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                break
        assert (await stub.Check(request, timeout=20)).status == answer.status


async def test_health_follows_readiness() -> None:
    async with fake_server(prefill=0, decode=0) as cluster, channel_to(cluster) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await cluster.add(Role.DECODE, "decode-0", say("x"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
