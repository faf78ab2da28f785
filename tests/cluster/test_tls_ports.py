"""A cluster with TLS: it answers as one without, and every port of every process is tried.

Ports are those that the kernel lists, so that none is forgotten: also those of UCX (under NIXL), of
gloo and of torch, which know nothing of certificates and must be out of reach instead.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.rpc.errors import CODE_KEY
from baton.rpc.grpc_client import bearer
from baton.rpc.tls import PEER_NAME
from baton.v1 import inference_pb2, inference_pb2_grpc
from tests.certificates import Authority, Pair
from tests.cluster.conftest import Cluster, ClusterFactory, serve
from tests.listening import Port, tcp_ports

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPTS = ["def fibonacci(n):", "the", "a list of names: " * 20]
SHAPE = ("--kv-memory-mib", "64", "--store-memory-mib", "32", "--dtype", "float32")
ANSWER_S = 4.0
MEMBERS = 3  # prefill, decode, store
INTERNAL = (
    "/baton.v1.Fleet/Register",
    "/baton.v1.Fleet/Renew",
    "/baton.v1.Fleet/Leave",
    "/baton.v1.Worker/Link",
    "/baton.v1.Handoff/Pair",
    "/baton.v1.Blocks/Pair",
)


@dataclass(frozen=True)
class Secured:
    """A cluster, and what a stranger could have: everything but a certificate of its authority."""

    cluster: Cluster
    ours: Authority
    other: Authority
    metrics: frozenset[str]  # where workers and the store have theirs

    def ports(self) -> list[Port]:
        found = sorted(tcp_ports(self.cluster.pids()))
        assert len({port.pid for port in found}) >= 4  # conductor, prefill, decode, store
        return found


@pytest.fixture(scope="module", params=["nixl", "nccl"])
def secured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Secured]:
    files = tmp_path_factory.mktemp("files")
    ours, other = Authority(files, "ours"), Authority(files, "other")
    internal, front = ours.issue(PEER_NAME), ours.issue("127.0.0.1")
    flags = (
        *("--tls-cert", str(internal.cert), "--tls-key", str(internal.key)),
        *("--tls-ca", str(ours.ca)),
        *("--ssl-certfile", str(front.cert), "--ssl-keyfile", str(front.key)),
        *("--transport", request.param),
    )
    first = ports_in_a_row(MEMBERS)
    flags += ("--metrics-port", str(first))
    metrics = frozenset(f"127.0.0.1:{first + number}" for number in range(MEMBERS))
    trusts = ssl.create_default_context(cafile=str(ours.ca))
    with serve(tmp_path_factory.mktemp("cluster"), *SHAPE, *flags, trusts=trusts) as cluster:
        for prompt in PROMPTS:  # links, handoffs and loans are there: all that ever listens does
            complete(cluster, prompt)
        yield Secured(cluster, ours, other, metrics)


def ports_in_a_row(count: int) -> int:
    """The first of some where nobody listens now, below those that the kernel gives to others."""
    for first in range(20_000 + os.getpid() % 1_000 * count, 30_000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    pytest.fail("no ports are free")


def complete(cluster: Cluster, prompt: str) -> str:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    reply = cluster.post("/v1/completions", body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def test_it_answers_as_a_cluster_without_tls(
    secured: Secured, start_cluster: ClusterFactory
) -> None:
    with start_cluster(*SHAPE) as plain:
        expected = [complete(plain, prompt) for prompt in PROMPTS]
    assert [complete(secured.cluster, prompt) for prompt in PROMPTS] == expected


def test_client_commands_trust_the_authority_that_they_are_told(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = secured.cluster.cli("generate", "def", "--max-tokens", "4")
    assert refused.returncode != 0
    assert "--ca-file" in refused.stderr
    assert secured.cluster.cli("status", "--ca-file", str(secured.ours.ca)).returncode == 0
    monkeypatch.setenv("BATON_CA_FILE", str(secured.ours.ca))
    assert secured.cluster.cli("generate", "def", "--max-tokens", "4").returncode == 0
    load = ("--requests", "1", "--input-tokens", "8", "--output-tokens", "2", "--warmup", "0")
    assert secured.cluster.cli("bench", "serve", *load).returncode == 0


def test_nothing_listens_outside_of_loopback(secured: Secured) -> None:
    assert [port for port in secured.ports() if not port.is_loopback] == []


def test_a_stranger_is_refused_at_every_port(secured: Secured) -> None:
    """In plaintext, by TLS without a certificate, and with one of another authority: only what is
    meant for clients answers, and only by TLS."""
    public = {
        secured.cluster.http: {"https"},
        secured.cluster.grpc: {"health", "inference"},
    }
    trials = [(p.address, how) for p in secured.ports() for how in ("plain", "without", "other")]
    with ThreadPoolExecutor(len(trials)) as threads:
        results = threads.map(lambda trial: try_everything(secured, *trial), trials)
        answered = dict(zip(trials, results, strict=True))
    assert answered == {
        (address, how): set() if how == "plain" else public.get(address, set())
        for address, how in answered
    }
    assert public.keys() <= {address for address, _ in answered}


def test_a_peer_of_the_cluster_gets_in_and_not_without_the_token(secured: Secured) -> None:
    """What the others are refused is there: the trial finds it with the right certificate."""
    for token, expected in ((secured.cluster.token, set(INTERNAL)), ("wrong", set())):
        ports = secured.ports()
        with ThreadPoolExecutor(len(ports)) as threads:
            tried = threads.map(
                lambda port, token=token: grpc_answers(secured, port.address, "ours", token), ports
            )
            found: set[str] = set().union(*tried)
        assert found & set(INTERNAL) == expected


def test_a_peer_of_the_cluster_reads_metrics(secured: Secured) -> None:
    """And what others are refused is there, at every such port."""
    assert secured.metrics <= {port.address for port in secured.ports()}
    for address in secured.metrics:
        assert 'not_after_timestamp_seconds{use="internal"}' in metrics(secured, address, "ours")
    public = metrics(secured, secured.cluster.http, "without")
    for use in ("internal", "public"):
        assert f'not_after_timestamp_seconds{{use="{use}"}}' in public


def try_everything(secured: Secured, address: str, how: str) -> set[str]:
    """What answered. `how` is what the caller has: see `caller`."""
    token = secured.cluster.token
    return grpc_answers(secured, address, how, token) | http_answers(secured, address, how)


def grpc_answers(secured: Secured, address: str, how: str, token: str) -> set[str]:
    with caller(secured, address, how) as channel:
        calls: dict[str, Callable[[], object]] = {
            name: partial(call_internal, channel, name, token) for name in INTERNAL
        }
        health = health_pb2_grpc.HealthStub(channel).Check
        models = inference_pb2_grpc.InferenceStub(channel).ListModels
        calls["health"] = lambda: health(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
        calls["inference"] = lambda: models(inference_pb2.ListModelsRequest(), timeout=ANSWER_S)
        with ThreadPoolExecutor(len(calls)) as threads:
            answered = threads.map(is_answered, calls.values())
            return {name for name, yes in zip(calls, answered, strict=True) if yes}


def call_internal(channel: grpc.Channel, method: str, token: str) -> None:
    """An empty request; of a stream, its end."""
    call = channel.stream_stream(method)(iter([b""]), metadata=bearer(token), timeout=ANSWER_S)
    for _ in call:
        pass


def is_answered(call: Callable[[], object]) -> bool:
    """Whether it got as far as the service."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:  # no connection, or what a service says
            return CODE_KEY in dict(error.trailing_metadata() or ())
        return error.code() not in _REFUSED
    return True


_REFUSED = {
    grpc.StatusCode.DEADLINE_EXCEEDED,  # no connection yet: who listens is not gRPC, and waits
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,  # a server without that service
}


def caller(secured: Secured, address: str, how: str) -> grpc.Channel:
    """`plain`; by TLS `without` a certificate; with one of the `other` authority; with one of
    `ours`."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    if how == "plain":
        return grpc.insecure_channel(address, options)
    pair = pair_of(secured, how)
    credentials = grpc.ssl_channel_credentials(
        secured.ours.ca.read_bytes(),
        pair and pair.key.read_bytes(),
        pair and pair.cert.read_bytes(),
    )
    front = address == secured.cluster.grpc
    name = ("grpc.ssl_target_name_override", "127.0.0.1" if front else PEER_NAME)
    return grpc.secure_channel(address, credentials, [*options, name])


def pair_of(secured: Secured, how: str) -> Pair | None:
    if how == "without":
        return None
    return (secured.ours if how == "ours" else secured.other).issue(PEER_NAME)


def http_answers(secured: Secured, address: str, how: str) -> set[str]:
    if not metrics(secured, address, how):
        return set()
    return {"http" if how == "plain" else "https"}


def metrics(secured: Secured, address: str, how: str) -> str:
    """Whatever is answered; empty: there was no answer."""
    scheme = "http" if how == "plain" else "https"
    context = ssl.create_default_context(cafile=str(secured.ours.ca))
    context.check_hostname = False
    if how != "plain" and (pair := pair_of(secured, how)):
        context.load_cert_chain(pair.cert, pair.key)
    with httpx.Client(verify=context, trust_env=False, timeout=ANSWER_S) as client:
        try:
            reply = client.get(f"{scheme}://{address}/metrics")
        except httpx.HTTPError:
            return ""
        return f"{reply.status_code} {reply.text}"
