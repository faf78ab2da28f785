"""What clients, workers and strangers may say to a conductor over gRPC: Inference and Fleet, and
what workers answer on the links that it keeps to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import httpx
from hypothesis import strategies as st

from baton.rpc.codec_fleet import info_to_pb, load_to_pb
from baton.rpc.codec_report import ReportDecoder, ReportEncoder
from baton.types.figures import OfferCounts
from baton.types.fleet import BlockState, Role, WorkerLoad
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import StepReport
from baton.types.request import (
    AttemptId,
    AttemptOutput,
    Finish,
    FinishReason,
    GenerationTask,
    SampledToken,
    Span,
    TokenLogprob,
    WireError,
)
from baton.v1 import fleet_pb2, inference_pb2, worker_pb2
from tests.fake_worker import FakeCluster, Script, echo, fake_server, worker_info
from tests.fuzz.campaign import Campaign, ErrorLog
from tests.fuzz.grpc_peer import Growth, Host, Peer, until
from tests.fuzz.messages import Odd

INFERENCE, FLEET = "/baton.v1.Inference/", "/baton.v1.Fleet/"
Call = tuple[str, bytes]
UNSPOKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}


def _inference() -> dict[str, list[Any]]:
    pb = inference_pb2
    sampling = pb.SamplingOptions(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1.0, seed=7, max_tokens=5,
        min_tokens=1, logit_bias={5: 1.5}, stop=["x"], stop_token_ids=[3], logprobs=2, n=2,
    )  # fmt: skip
    ids, chat = pb.TokenIds(ids=[1, 2, 3]), pb.ChatMessages(
        messages=[pb.ChatMessage(role="user", content="hi")]
    )  # fmt: skip
    return {
        "Generate": [
            pb.GenerateRequest(model="tiny", text="hello"),
            pb.GenerateRequest(model="tiny", token_ids=ids, sampling=sampling, cache_salt="s"),
            pb.GenerateRequest(model="tiny", chat=chat, request_id="r", cache_pin_s=5.0),
        ],
        "Tokenize": [
            pb.TokenizeRequest(model="tiny", text="hello", add_special_tokens=True),
            pb.TokenizeRequest(model="tiny", chat=chat),
        ],
        "ListModels": [pb.ListModelsRequest()],
    }


def _fleet() -> dict[str, list[Any]]:
    pb = fleet_pb2
    load = load_to_pb(
        WorkerLoad(1, 2, 30, ((BlockState.FREE, 20), (BlockState.ACTIVE, 12)), OfferCounts(1))
    )
    infos = [
        worker_info("new", Role.DECODE, node="n", cpus="0-3"),
        worker_info("decode-0", Role.DECODE),
        worker_info("store", Role.STORE),
    ]
    # Not under the names of the real workers, which would replace them.
    return {
        "Register": [pb.RegisterRequest(info=info_to_pb(info)) for info in (infos[0], infos[2])],
        "Renew": [
            pb.RenewRequest(name=info.name, incarnation=info.incarnation, load=load)
            for info in infos
        ],
        "Leave": [pb.LeaveRequest(name="new", incarnation="new-life-1")],
    }


def _calls(service: str, good: dict[str, list[Any]]) -> st.SearchStrategy[list[Call]]:
    kinds = [
        st.tuples(st.just(service + name), Odd(messages).messages())
        for name, messages in good.items()
    ]
    return st.lists(st.one_of(kinds), min_size=1, max_size=5)


async def _check_good(cluster: FakeCluster, peer: Peer) -> None:
    """It lives, and serves. With a single client of its own, as everybody has."""
    await peer.check_health()
    good = inference_pb2.GenerateRequest(model="tiny", text="hello")
    assert await peer.call(INFERENCE + "Generate", good.SerializeToString()) is grpc.StatusCode.OK
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False, verify=False) as client:
        body = {"model": "tiny", "prompt": "hello"}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        for path in ("/cluster", "/metrics"):
            assert (await client.get(path)).status_code == 200
    await cluster.check_nothing_left()


def _try_calls(
    campaign: Campaign,
    errors: ErrorLog,
    calls: st.SearchStrategy[list[Call]],
    allowed: Callable[[str, grpc.StatusCode], bool],
    examples: int,
) -> None:
    growth = Growth()
    with Host(fake_server(echo, lease_ttl=30.0)) as host:
        cluster = host.made

        async def play(said: list[Call]) -> None:
            peer = Peer(cluster.grpc)
            await _keep(cluster)
            for method, message in said:
                code = await peer.call(method, message)
                assert allowed(method, code), (method, code)
            await _check_good(cluster, peer)
            await peer.aclose()
            growth.check()
            errors.check()

        campaign.run(calls, lambda case: host.run(play(case)), examples=examples)
    errors.check()


async def _keep(cluster: FakeCluster) -> None:
    """The leases of the workers that are real: they do not renew by themselves."""
    for worker in cluster.workers.values():
        info = worker.info
        await cluster.conductor.fleet.renew(info.name, info.incarnation, WorkerLoad())


def test_inference(campaign: Campaign, errors: ErrorLog) -> None:
    calls = _calls(INFERENCE, _inference())
    _try_calls(campaign, errors, calls, lambda _, code: code not in UNSPOKEN, examples=60)


def test_fleet(campaign: Campaign, errors: ErrorLog) -> None:
    """From those who have the token. An enum number of another version is an internal error."""
    unspoken = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED}
    calls = _calls(FLEET, _fleet())
    _try_calls(campaign, errors, calls, lambda _, code: code not in unspoken, examples=60)


def test_strangers_are_refused_by_conductors(campaign: Campaign, errors: ErrorLog) -> None:
    with Host(fake_server()) as host:
        cluster = host.made

        async def play(said: list[Call]) -> None:
            for token in ("", "wrong"):
                stranger = Peer(cluster.grpc, token)
                for method, message in said:
                    code = await stranger.call(method, message)
                    assert code is grpc.StatusCode.UNAUTHENTICATED
                await stranger.aclose()
            assert len(cluster.conductor.fleet.view().workers) == 2
            errors.check()

        campaign.run(_calls(FLEET, _fleet()), lambda case: host.run(play(case)), examples=10)


# -- what workers answer ---------------------------------------------------------------------------


def _reports() -> list[Any]:
    attempts = [AttemptId("cmpl-1"), AttemptId("cmpl-1", 2)]
    token = SampledToken(65, 0, TokenLogprob(-0.5, ((65, -0.5), (66, -1.0))))
    spans = (Span("prefill", 1.0, 2.0), Span("decode", 2.0, 3.0))
    finishes = [
        Finish(FinishReason.STOP, None, 3, spans),
        Finish(FinishReason.ERROR, WireError("overloaded", "no", retryable=True)),
        Finish(FinishReason.HANDED_OFF),
    ]
    load = WorkerLoad(1, 1, 5, ((BlockState.FREE, 10),), OfferCounts(1, 2, 3, 4))
    said: list[Any] = [
        StepReport((AttemptOutput(attempts[0], (SampledToken(65, 0),)),), load),
        StepReport((AttemptOutput(attempts[0], (token,)), AttemptOutput(attempts[1])), load),
        *(StepReport((AttemptOutput(attempts[0], (), finish),), load) for finish in finishes),
        KvEvents(1, Tier.GPU, bytes(32), b"k" * 16),
        KvSnapshot(1, Tier.GPU, bytes(32), True, True),
    ]
    return [ReportEncoder().encode(message) for message in said]


def _script(task: GenerationTask) -> Script:
    """Echo, but nothing at all to "hang"."""
    hangs = task.prompt[-4:] == tuple(b"hang")
    return replace(echo(task), hang_at=len(task.output) if hangs else None)


def test_what_workers_answer(campaign: Campaign, errors: ErrorLog) -> None:
    """On the link of a worker that the conductor has dialled, of a request that it has. What cannot
    be decoded ends the link, as over gRPC; the conductor dials again."""
    messages = st.lists(Odd(_reports()).messages(), min_size=1, max_size=8)
    hang = inference_pb2.GenerateRequest(model="tiny", text="hang").SerializeToString()
    with Host(fake_server(_script)) as host:
        cluster = host.made

        async def play(said: list[bytes]) -> None:
            worker, decoder, peer = cluster.workers["decode-0"], ReportDecoder(), Peer(cluster.grpc)
            both, tasks = list(cluster.workers.values()), len(worker.tasks)
            links = [len(each.links) for each in both]
            waiting = asyncio.create_task(peer.call(INFERENCE + "Generate", hang))
            await until(lambda: len(worker.tasks) > tasks, lambda: "nothing was started")
            attempt = worker.tasks[-1].attempt
            for raw in said:
                try:
                    message = decoder.decode(worker_pb2.WorkerMessage.FromString(raw))
                except Exception:  # see `WireDuplex`: any
                    break
                if isinstance(message, StepReport):
                    ours = (replace(output, attempt=attempt) for output in message.outputs)
                    message = replace(message, outputs=tuple(ours))
                await worker.links[-1].send(message)
            await asyncio.sleep(0.01)
            for each in both:  # whoever was told that all is over holds nothing by its link's end
                await each.links[-1].aclose()
            waiting.cancel()
            await asyncio.wait([waiting])
            dialled = lambda: all(len(w.links) > n for w, n in zip(both, links, strict=True))  # noqa: E731
            await until(dialled, lambda: "the conductor did not dial")
            await _check_good(cluster, peer)
            await peer.aclose()
            errors.check()

        campaign.run(messages, lambda case: host.run(play(case)), examples=30)
    errors.check()
