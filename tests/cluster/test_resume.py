"""A worker is killed while it generates: the client's stream goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import grpc
import pytest

from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.cluster.conftest import Cluster, ClusterFactory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PROMPT = tuple(range(5, 45))
MAX_TOKENS = 600
KILL_AFTER = (20, 250)  # tokens


@pytest.fixture(scope="module")
def pairs(start_cluster: ClusterFactory) -> Iterator[Cluster]:
    flags = ("--prefill", "2", "--decode", "2", "--dtype", "float32", "--kv-memory-mib", "64")
    with start_cluster(*flags) as running:
        yield running


def stream(cluster: Cluster, temperature: float) -> Iterator[tuple[int, ...]]:
    """The ids of an answer as they come."""
    with grpc.insecure_channel(cluster.grpc) as channel:
        request = inference_pb2.GenerateRequest(
            model=cluster.ready["model"],
            token_ids=inference_pb2.TokenIds(ids=PROMPT),
            sampling=inference_pb2.SamplingOptions(
                max_tokens=MAX_TOKENS,
                temperature=temperature,
                seed=11,
                ignore_eos=True,
                repetition_penalty=1.1,  # depends on all tokens so far
            ),
            cache_salt=f"{temperature}",
        )
        for message in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=200):
            yield tuple(message.token_ids)


def kill_who_generates(cluster: Cluster) -> None:
    workers = cluster.status()["workers"]
    busy = [w for w in workers if w["role"] == "decode" and w["state"] == "live" and w["running"]]
    with contextlib.suppress(ProcessLookupError):
        os.kill(busy[0]["pid"], signal.SIGKILL)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_answer_is_that_of_an_undisturbed_run(pairs: Cluster, temperature: float) -> None:
    undisturbed = [token for ids in stream(pairs, temperature) for token in ids]
    assert len(undisturbed) == MAX_TOKENS
    tokens: list[int] = []
    kills = list(KILL_AFTER)
    for ids in stream(pairs, temperature):
        tokens += ids
        if kills and len(tokens) >= kills[0]:
            kill_who_generates(pairs)
            del kills[0]
    assert tokens == undisturbed
    metrics = pairs.get("/metrics").text
    assert _value(metrics, "baton_resumes_total") >= 2
    assert not _value(metrics, "baton_poison_requests_total")
    pairs.assert_idle()


def _value(metrics: str, name: str) -> float:
    return next(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name))
