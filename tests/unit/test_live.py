"""What the page is told: figures, flows, hits and requests, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from baton.types.figures import OfferCounts, StoreFigures, TierFigures, TierState
from baton.types.fleet import Peer, Role, WorkerLoad
from baton.types.kv_events import Tier
from baton.types.link import FetchPart
from baton.types.request import Finish, FinishReason, Span
from conductor.admission import Slos
from conductor.cluster import ConductorIdentity
from conductor.estimate import Candidate
from conductor.goodput import Latencies
from conductor.live import Live, fetched_tokens
from conductor.live_view import MAX_MEMBERS, MAX_REQUESTS, TICK_S, LiveView
from conductor.request import Ask, Options
from conductor.router import Decision
from conductor.service import Conductor, Policy
from conductor.views import WorkerView
from tests.fake_worker import BLOCK_SIZE, FakeCluster, fake_cluster, layout, say, worker_info
from tests.virtual_time import virtual_time

BLOCK_BYTES = layout().block_bytes
IDENTITY = ConductorIdentity("c", 1, "life", "127.0.0.1:1", "127.0.0.1:2", 0.0)
SECRET = "a prompt that nobody may see"


def decision(prefill: bool = True, plan: tuple[FetchPart, ...] = ()) -> Decision:
    def view(name: str, role: Role) -> WorkerView:
        return WorkerView(worker_info(name, role), state="live", load=WorkerLoad())  # type: ignore[arg-type]

    chosen = Candidate("p", "", 0.0, 0.0, 0.1)
    worker = view("p", Role.PREFILL) if prefill else None
    return Decision(worker, view("d", Role.DECODE), chosen, (chosen,), "x", plan)


def part(source: str, tier: Tier, first: int, count: int) -> FetchPart:
    return FetchPart(Peer(source, "1", "a:1"), first, count, tier)


def done(reason: FinishReason, cached: int, *spans: str) -> Finish:
    return Finish(reason, None, cached, tuple(Span(name, 0.0, 1.0) for name in spans))


async def ask(conductor: Conductor, text: str = SECRET, tokens: int = 8) -> None:
    options = Options(max_tokens=tokens)
    request = await conductor.prepare(Ask("tiny", (text,), options), "cmpl")
    async for _ in conductor.generate(request):
        pass


def look(cluster: FakeCluster) -> dict[str, Any]:
    return dict(orjson.loads(LiveView(cluster.conductor, IDENTITY).snapshot()))


@virtual_time
async def test_figures_of_requests() -> None:
    async with fake_cluster(say("hello world", prefill_s=0.5)) as cluster:
        await ask(cluster.conductor)
        await asyncio.sleep(1.5)
        seen = look(cluster)
        minute, longer = seen["periods"]
        assert (minute["period_s"], longer["period_s"]) == (60, 300)
        assert (minute["requests"], minute["failed"]) == (1, 0)
        assert minute["ttft_s"]["p50"] == pytest.approx(0.5, rel=0.03)
        assert minute["ttft_s"]["p99"] == pytest.approx(0.5, rel=0.03)
        assert minute["requests_per_s"] == pytest.approx(1 / 2, rel=0.01)
        assert minute["tokens_per_s"] == pytest.approx(8 / 2, rel=0.01)
        assert minute["goodput_per_s"] is None  # no SLO, no goodput
        (request,) = seen["requests"]
        assert request["outcome"] == "ok"
        assert request["ttft_s"] == pytest.approx(0.5)
        assert (request["prompt_tokens"], request["output_tokens"]) == (len(SECRET), 8)
        assert (request["prefill"], request["decode"]) == ("prefill-0", "decode-0")
        await asyncio.sleep(400)
        assert [period["requests"] for period in look(cluster)["periods"]] == [0, 0]


@virtual_time
async def test_no_text_of_a_prompt_or_an_answer_is_told() -> None:
    async with fake_cluster(say("an answer that nobody may see")) as cluster:
        await ask(cluster.conductor)
        assert b"nobody" not in LiveView(cluster.conductor, IDENTITY).snapshot()


@virtual_time
async def test_goodput_counts_what_kept_the_slos() -> None:
    live = Live(lambda: 0, Slos(ttft_s=1.0, tpot_s=0.1))
    live.note_end("ok", Latencies(0.5, 0.05))
    live.note_end("ok", Latencies(0.5, None))  # one token
    live.note_end("ok", Latencies(1.5, 0.05))
    live.note_end("ok", Latencies(0.5, 0.2))
    live.note_end("cancelled", Latencies(0.5, 0.05))
    live.note_end("no_worker", Latencies(None, None))
    await asyncio.sleep(10)
    minute = live.figures()["periods"][0]
    assert (minute["requests"], minute["failed"]) == (6, 2)
    assert minute["goodput_per_s"] == pytest.approx(2 / 10)


@virtual_time
async def test_tokens_are_counted_without_a_call_per_token() -> None:
    made = 0
    live = Live(lambda: made, Slos())
    await asyncio.sleep(100)
    live.note_begin()
    await asyncio.sleep(20)
    made = 400
    history = live.figures()["history"]
    assert len(history["tokens_per_s"]) == 60
    assert history["tokens_per_s"][-4:] == [20.0] * 4
    assert history["tokens_per_s"][-5] == 0.0
    assert live.figures()["now"]["tokens_per_s"] == pytest.approx(20.0)


@virtual_time
async def test_hits_by_where_they_were() -> None:
    live = Live(lambda: 0, Slos())
    plan = (part("q", Tier.GPU, 2, 2), part("s", Tier.NVME, 4, 4))
    ended = done(FinishReason.HANDED_OFF, 6 * BLOCK_SIZE, "queue", "prefill", "handoff")
    live.note_finish(decision(plan=plan), 10 * BLOCK_SIZE, Role.PREFILL, ended)
    minute = live.figures()["periods"][0]
    assert minute["prompt_tokens"] == 10 * BLOCK_SIZE
    assert minute["hits"] == dict.fromkeys(("own", "peer", "nvme"), 2 * BLOCK_SIZE)
    flows = {(f["source"], f["target"], f["kind"]): f["bytes"] for f in live.flows()}
    assert flows == {
        ("p", "d", "handoff"): 10 * BLOCK_BYTES,
        ("q", "p", "fetch"): 2 * BLOCK_BYTES,
        ("s", "p", "fetch"): 2 * BLOCK_BYTES,
    }
    await asyncio.sleep(30)
    assert {flow["bytes_per_s"] for flow in live.flows()} == {0.0}
    await asyncio.sleep(60)
    assert live.flows() == []


@virtual_time
async def test_what_computes_no_prompt_counts_nothing() -> None:
    live = Live(lambda: 0, Slos())
    live.note_finish(decision(), 64, Role.DECODE, done(FinishReason.STOP, 64, "decode"))
    live.note_finish(decision(), 64, Role.PREFILL, done(FinishReason.CANCELLED, 0, "queue"))
    assert live.flows() == []
    assert live.figures()["periods"][0]["prompt_tokens"] == 0
    live.note_finish(
        decision(prefill=False), 64, Role.DECODE, done(FinishReason.STOP, 32, "decode")
    )
    assert live.figures()["periods"][0]["hits"] == {"own": 32}


@pytest.mark.parametrize(("cached", "want"), [(0, 0), (32, 0), (40, 8), (64, 32), (999, 32)])
def test_what_came_of_a_fetch(cached: int, want: int) -> None:
    finish = done(FinishReason.STOP, cached)
    assert fetched_tokens(part("s", Tier.CPU, 2, 2), finish, BLOCK_SIZE) == want


@virtual_time
async def test_a_look_is_made_once_a_tick() -> None:
    async with fake_cluster() as cluster:
        view = LiveView(cluster.conductor, IDENTITY)
        first = view.snapshot()
        await asyncio.sleep(TICK_S / 2)
        assert view.snapshot() is first
        await asyncio.sleep(TICK_S / 2)
        assert view.snapshot() is not first


@virtual_time
async def test_offers_to_a_store_are_flows() -> None:
    async with fake_cluster() as cluster:
        fleet = cluster.conductor.fleet
        worker = await cluster.add(Role.PREFILL, "prefill-9", say("x"), node="n")
        store = await cluster.add(Role.STORE, "store-0", say("x"), node="n")
        view = LiveView(cluster.conductor, IDENTITY)

        async def tell(read: int) -> list[dict[str, Any]]:
            load = WorkerLoad(offers=OfferCounts(read=read))
            await fleet.renew("prefill-9", worker.info.incarnation, load)
            await asyncio.sleep(TICK_S)
            return list(orjson.loads(view.snapshot())["flows"])

        assert await tell(5) == []  # totals of a time in which nobody looked
        (flow,) = await tell(8)
        assert (flow["source"], flow["target"], flow["kind"]) == ("prefill-9", "store-0", "offer")
        assert flow["bytes"] == 3 * BLOCK_BYTES
        tier = TierFigures(Tier.CPU, TierState.ON, blocks=3, capacity=10)
        full = WorkerLoad(store=StoreFigures((tier,)))
        await fleet.renew("store-0", store.info.incarnation, full)
        (told,) = look(cluster)["stores"]
        assert told["store"]["tiers"][0]["bytes"] == 3 * BLOCK_BYTES


@virtual_time
async def test_a_look_is_bounded() -> None:
    async with fake_cluster(say("x"), policy=Policy(lease_ttl_s=1e6)) as cluster:
        for number in range(MAX_REQUESTS + 5):
            await ask(cluster.conductor, f"prompt {number}", tokens=1)
        for number in range(MAX_MEMBERS):
            await cluster.add(Role.PREFILL, f"z{number:03}", say("x"))
        await cluster.conductor.fleet.leave("z127", "z127-life-1")
        seen = look(cluster)
        assert len(seen["requests"]) == MAX_REQUESTS
        assert seen["requests"][0]["received_s"] >= seen["requests"][-1]["received_s"]
        assert len(seen["workers"]) == MAX_MEMBERS
        assert "z127" in {worker["name"] for worker in seen["workers"]}  # it is not well
        assert seen["pools"]["prefill"]["members"] == MAX_MEMBERS + 1
        assert seen["pools"]["prefill"]["states"] == {"live": MAX_MEMBERS, "draining": 1}
