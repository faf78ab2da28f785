"""What conductors and other workers may say to a worker over gRPC: link, handoff and blocks.

A prefill and a decode worker with all that production has, but for the model and the transport, on
loopback ports. In each case several streams say things at the same time; then all end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
from hypothesis import strategies as st

from baton.kv.transport.loopback import LoopbackFabric
from baton.rpc.codec_blocks import blocks_to_pb
from baton.rpc.codec_handoff import decode_to_pb
from baton.rpc.codec_link import conductor_to_pb
from baton.rpc.grpc_client import GrpcBlocksDialer, GrpcHandoffDialer, GrpcWorkerDialer
from baton.rpc.grpc_server import RpcServer
from baton.types.blocks import Ask, BlocksHello, RenewLoans, Return, Returned
from baton.types.blocks import Offer as BlocksOffer
from baton.types.fleet import Peer as WorkerPeer
from baton.types.handoff import Abort, Attach, Hello, Release, Renew
from baton.types.kv_events import Tier
from baton.types.link import Adopt, Cancel, Drain, FetchPart, Resync, StartDecode, StartPrefill
from baton.types.request import AttemptId, FinishReason, GenerationTask, SamplingParams
from decode_worker.service import DecodeService
from prefill_worker.service import PrefillService
from tests.fuzz.campaign import Campaign, ErrorLog
from tests.fuzz.grpc_peer import TOKEN, Growth, Host, Peer, until
from tests.fuzz.messages import Odd, greeted
from tests.unit.worker_rig import LAYOUT, Conductor, is_idle, make_parts

LINK, HANDOFF, BLOCKS = "/baton.v1.Worker/Link", "/baton.v1.Handoff/Pair", "/baton.v1.Blocks/Pair"
A, B = AttemptId("a"), AttemptId("b", 2)
PROMPT = tuple(range(1, 12))
ELSEWHERE = WorkerPeer("x", "x-life", "127.0.0.1:1")


@dataclass
class Workers:
    prefill: PrefillService
    decode: DecodeService
    to_prefill: Peer
    to_decode: Peer
    peer: WorkerPeer  # the prefill worker
    good: int = 0

    async def check_idle(self) -> None:
        loads = (self.prefill.load, self.decode.load)
        await until(lambda: all(is_idle(load()) for load in loads), lambda: [x() for x in loads])
        self.prefill.check_integrity()
        self.decode.check_integrity()
        pairs = (self.prefill._publisher._pairs, self.decode._reader._pairs)
        ours = ({"d/d-life"}, {"p/p-life"})  # the stream between the two stays
        await until(lambda: all(map(lambda p, o: set(p) <= o, pairs, ours)), lambda: pairs)

    async def check_good(self) -> None:
        """Both are healthy, and a request is served by both."""
        self.good += 1
        attempt = AttemptId(f"good-{self.good}")
        task = _task(attempt, max_tokens=3)
        dialer = GrpcWorkerDialer(TOKEN)
        links = [
            Conductor(await dialer.link(to.address, 5.0))
            for to in (self.to_prefill, self.to_decode)
        ]
        async with asyncio.TaskGroup() as tasks:
            for link in links:
                tasks.create_task(link.listen())
            await links[0].send(StartPrefill(task))
            await links[1].send(StartDecode(task, self.peer))
            assert (await links[1].finish(attempt)).reason is FinishReason.LENGTH
            assert (await links[0].finish(attempt)).reason is FinishReason.HANDED_OFF
            for link in links:
                await link.stream.aclose()
        await self.to_prefill.check_health()
        await self.to_decode.check_health()

    async def check_refused(self) -> None:
        """Both take no more work, and say so."""
        task = _task(AttemptId("late"), max_tokens=3)
        dialer = GrpcWorkerDialer(TOKEN)
        starts = ((self.to_prefill, StartPrefill(task)), (self.to_decode, StartDecode(task)))
        for to, start in starts:
            link = Conductor(await dialer.link(to.address, 5.0))
            listening = asyncio.create_task(link.listen())
            await link.send(start)
            error = (await link.finish(task.attempt)).error
            assert error is not None
            assert error.retryable
            await link.stream.aclose()
            await listening
            await to.check_health()


@asynccontextmanager
async def workers() -> AsyncIterator[Workers]:
    fabric = LoopbackFabric()
    ours, theirs = await make_parts("p", fabric), await make_parts("d", fabric)
    theirs = replace(theirs, orphan_timeout_s=0.0)  # nobody adopts: it ends with its link
    prefill = PrefillService(ours, GrpcBlocksDialer(TOKEN))
    decode = DecodeService(theirs, GrpcHandoffDialer(TOKEN), GrpcBlocksDialer(TOKEN))
    servers = [RpcServer("127.0.0.1:0", TOKEN) for _ in range(2)]
    prefill.serve_on(servers[0])
    decode.serve_on(servers[1])
    addresses = [await server.start() for server in servers]
    peer = WorkerPeer("p", ours.identity.incarnation, addresses[0])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(prefill.run())
        tasks.create_task(decode.run())
        made = Workers(prefill, decode, Peer(addresses[0]), Peer(addresses[1]), peer)
        yield made
        await made.to_prefill.aclose()
        await made.to_decode.aclose()
        await prefill.aclose()
        await decode.aclose()
        for server in servers:
            await server.stop(1.0)
    await ours.close()
    await theirs.close()


def _task(attempt: AttemptId, **sampling: Any) -> GenerationTask:
    return GenerationTask(attempt, PROMPT, SamplingParams(**sampling))


def _link_messages(peer: WorkerPeer) -> list[Any]:
    parts = (FetchPart(peer, 0, 2, Tier.GPU), FetchPart(ELSEWHERE, 1, 1, Tier.CPU))
    long = replace(_task(A, max_tokens=100), timeout_s=20.0, cache_salt="s", cache_pin_s=60.0)
    resumed = replace(_task(B, max_tokens=9), output=(5, 6), priority=3)
    said = [StartPrefill(_task(A, max_tokens=4)), StartPrefill(long, parts), StartPrefill(resumed)]
    said += [StartDecode(_task(A, max_tokens=4), peer), StartDecode(long, None, parts)]
    said += [StartDecode(resumed), StartDecode(_task(B, max_tokens=5, logprobs=2), ELSEWHERE)]
    said += [Adopt(A), Adopt(B), Cancel(A, "gone"), Cancel(B, ""), Resync(), Drain()]
    return [conductor_to_pb(message) for message in said]


def _handoff_messages() -> tuple[list[Any], Any]:
    hello = Hello("e", "e-life", LAYOUT, "loopback", b"?", 0.0, "p-life")
    said = [hello, Attach(A), Attach(B), Renew((A, B)), Release(A), Release(B, b"d" * 16)]
    said += [Abort(A, "gone")]
    return [decode_to_pb(message) for message in said], decode_to_pb(hello)


def _blocks_messages(expected: str) -> tuple[list[Any], Any]:
    hello = BlocksHello("e", "e-life", LAYOUT, "loopback", b"?", 5.0, expected)
    said = [hello, Ask(1, bytes(32)), Ask(2, b"k" * 16), RenewLoans((1, 2)), Return(1), Returned(1)]
    said += [BlocksOffer(3, bytes(16), (1,), 0, ())]
    return [blocks_to_pb(message) for message in said], blocks_to_pb(hello)


# The second: the stream that we still write to is reset before we have read why.
REFUSED = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INTERNAL}

Stream = tuple[str, str, list[bytes]]
"""Which worker, which method, what is said."""


def _streams(
    peer: WorkerPeer, endpoint: bytes, skip: tuple[str, ...] = ("drain",)
) -> st.SearchStrategy[list[Stream]]:
    """Without Drain, unless it is wanted: a worker that was told to take no more work does not."""
    link = st.lists(Odd(_link_messages(peer), skip=skip).messages(), max_size=8)
    handoffs, handoff_hello = _handoff_messages()
    blocks, blocks_hello = _blocks_messages("")
    for hello in (handoffs[0].hello, handoff_hello.hello, blocks[0].hello, blocks_hello.hello):
        hello.endpoint = endpoint
    pair = greeted(Odd(handoffs), handoff_hello)
    lent = greeted(Odd(blocks), blocks_hello)
    kinds = [
        st.tuples(st.sampled_from(["prefill", "decode"]), st.just(LINK), link),
        st.tuples(st.just("prefill"), st.just(HANDOFF), pair),
        st.tuples(st.sampled_from(["prefill", "decode"]), st.just(BLOCKS), lent),
    ]
    return st.lists(st.one_of(kinds), min_size=1, max_size=4)


def test_worker_services(campaign: Campaign, errors: ErrorLog) -> None:
    growth = Growth()
    with Host(workers()) as host:
        made = host.made
        endpoint = made.decode._reader._transport.endpoint()

        async def play(streams: list[Stream]) -> None:
            peers = {"prefill": made.to_prefill, "decode": made.to_decode}
            async with asyncio.TaskGroup() as tasks:
                for worker, method, messages in streams:
                    tasks.create_task(peers[worker].stream(method, messages))
            await made.check_idle()
            await made.check_good()
            await made.check_idle()
            growth.check()
            errors.check()

        campaign.run(_streams(made.peer, endpoint), lambda case: host.run(play(case)), examples=40)
    errors.check()


def test_workers_that_drain(campaign: Campaign, errors: ErrorLog) -> None:
    """Among all that is said, they are told to take no more work: what runs ends, what comes is
    refused so that conductors use others. New workers for every case."""

    async def play(made: Workers, streams: list[Stream]) -> None:
        peers = {"prefill": made.to_prefill, "decode": made.to_decode}
        async with asyncio.TaskGroup() as tasks:
            for worker, method, messages in streams:
                tasks.create_task(peers[worker].stream(method, messages))
        for peer in peers.values():
            await peer.stream(LINK, [conductor_to_pb(Drain()).SerializeToString()])
        await made.check_idle()
        await made.check_refused()
        await made.check_idle()
        errors.check()

    def one(streams: list[Stream]) -> None:
        with Host(workers()) as host:
            host.run(play(host.made, streams))

    peer = WorkerPeer("p", "p-life", "127.0.0.1:1")  # no port is known yet: KV comes from nowhere
    campaign.run(_streams(peer, b"?", skip=()), one, examples=10)
    errors.check()


def test_strangers_are_refused_by_workers(campaign: Campaign, errors: ErrorLog) -> None:
    """Whatever they say: they do not have the cluster's token."""
    with Host(workers()) as host:
        made = host.made

        async def play(streams: list[Stream]) -> None:
            for token in ("", "wrong", TOKEN + "2"):
                stranger = Peer(made.to_prefill.address, token)
                for _, method, messages in streams:
                    code = await stranger.stream(method, messages)
                    assert code in REFUSED
                    code = await stranger.stream(method, [])
                    assert code is grpc.StatusCode.UNAUTHENTICATED
                await stranger.aclose()
            await made.check_idle()
            errors.check()

        campaign.run(_streams(made.peer, b"?"), lambda case: host.run(play(case)), examples=10)
