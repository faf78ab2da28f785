"""Keys and tenants over gRPC: the same rules as over HTTP, with its statuses."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import grpc
import pytest

from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc
from tests.fake_worker import FakeCluster
from tests.tenants_kit import Files, ask, key_of


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def call(
    cluster: FakeCluster, key: str | None, method: str = "Generate", **fields: Any
) -> tuple[grpc.StatusCode, dict[str, str]]:
    """The status and the trailing metadata."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    metadata = () if key is None else (("authorization", f"Bearer {key}"),)
    async with grpc.aio.insecure_channel(cluster.grpc, options=options) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        if method == "Generate":
            sampling = pb.SamplingOptions(max_tokens=10)
            fields = {"model": "tiny", "text": "hello", "sampling": sampling} | fields
            started = stub.Generate(pb.GenerateRequest(**fields), metadata=metadata, timeout=20)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in started:  # its end comes behind what it says
                    pass
        elif method == "Tokenize":
            request = pb.TokenizeRequest(model="tiny", text="hello")
            started = stub.Tokenize(request, metadata=metadata, timeout=20)
        else:
            started = stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=20)
        return await started.code(), dict(await started.trailing_metadata() or ())


async def test_statuses(files: Files) -> None:
    files.write_tenants(
        {"name": "small", "limits": {"requests_per_minute": 1}}, {"name": "b", "models": ["big"]}
    )
    async with files.server() as cluster:
        for method in ("Generate", "Tokenize", "ListModels"):
            for key in (None, "wrong"):
                status, told = await call(cluster, key, method)
                assert status is grpc.StatusCode.UNAUTHENTICATED
                assert told["baton-error-code"] == "invalid_api_key"
        for method in ("Generate", "Tokenize"):
            status, told = await call(cluster, key_of("b"), method)
            assert status is grpc.StatusCode.PERMISSION_DENIED
            assert told["baton-error-code"] == "model_not_allowed"
        status, told = await call(cluster, key_of("small"))
        assert status is grpc.StatusCode.OK
        assert told["x-ratelimit-remaining-requests"] == "0"
        status, told = await call(cluster, key_of("small"))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert told["baton-error-code"] == "rate_limit_exceeded"
        assert 55_000 < int(told["retry-after-ms"]) < 61_000
        assert told["x-ratelimit-limit-requests"] == "1"
        assert (await ask(cluster, key_of("small"))).status_code == 429  # one account for both


async def test_the_salt_and_the_priority_are_the_tenants(files: Files) -> None:
    files.write_tenants({"name": "a", "priority": 2}, {"name": "b"})
    async with files.server() as cluster:
        seen = []
        for who in "ab":
            assert (await call(cluster, key_of(who), cache_salt="x"))[0] is grpc.StatusCode.OK
            await ask(cluster, key_of(who), cache_salt="x")
            seen += [(t.cache_salt, t.priority) for t in cluster.workers["decode-0"].tasks[-2:]]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert seen[0][0] not in (seen[2][0], "x")
    assert (seen[0][1], seen[2][1]) == (2, 0)
