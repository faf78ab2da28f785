"""What conductors count: goodput, bounded labels, examples that point to traces, gaps in news."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from baton.errors import WorkerLost
from baton.telemetry import Metrics
from baton.types.kv_events import KvEvents, KvSnapshot, Tier
from baton.types.link import Resync
from conductor.admission import Slos
from conductor.goodput import Goodput, Latencies
from conductor.kv_feed import KvFeed
from conductor.metrics import MAX_OUTCOMES
from conductor.prefix_map import PrefixMap
from conductor.service import Policy
from tests.fake_worker import FakeCluster, fake_cluster, fake_server, say
from tests.virtual_time import virtual_time

TRACE = "0af7651916cd43dd8448eb211c80319c"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def text_of(cluster: FakeCluster) -> str:
    return cluster.conductor.metrics.render().decode()


@pytest.mark.parametrize(
    ("latencies", "missed"),
    [
        (Latencies(0.5, 0.05), set()),
        (Latencies(0.5, None), set()),
        (Latencies(None, None), set()),
        (Latencies(1.5, 0.05), {"ttft"}),
        (Latencies(0.5, 0.15), {"tpot"}),
        (Latencies(1.5, 0.15), {"ttft", "tpot"}),
    ],
)
def test_goodput_is_what_kept_every_slo(latencies: Latencies, missed: set[str]) -> None:
    own = Metrics()
    Goodput(own, Slos(ttft_s=1.0, tpot_s=0.1)).note(latencies, 7)
    lines = own.render().decode().splitlines()
    assert f"baton_requests_within_slo_total {float(not missed)}" in lines
    assert f"baton_output_tokens_within_slo_total {0.0 if missed else 7.0}" in lines
    for slo in ("ttft", "tpot"):
        assert f'baton_slo_misses_total{{slo="{slo}"}} {float(slo in missed)}' in lines
    assert 'baton_slo_seconds{slo="ttft"} 1.0' in lines


def test_an_slo_that_is_not_set_is_kept() -> None:
    own = Metrics()
    Goodput(own, Slos()).note(Latencies(1e9, 1e9), 7)
    lines = own.render().decode().splitlines()
    assert "baton_requests_within_slo_total 1.0" in lines
    assert 'baton_slo_seconds{slo="tpot"} 0.0' in lines


async def complete(cluster: FakeCluster, **more: object) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 8, **more}
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "from-a-header"}
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as client:
        return await client.post("/v1/completions", json=body, headers=headers)


async def scrape(cluster: FakeCluster, accept: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as client:
        return await client.get("/metrics", headers={"accept": accept})


async def test_latencies_point_to_the_traces_of_sampled_requests() -> None:
    async with fake_server(say("hello")) as cluster:
        assert (await complete(cluster)).status_code == 200
        response = await scrape(cluster, OPENMETRICS)
        assert response.headers["content-type"].startswith("application/openmetrics-text")
        families = {family.name: family for family in parse_openmetrics(response.text)}
        for name in ("baton_ttft_seconds", "baton_e2e_seconds", "baton_tpot_seconds"):
            examples = [s.exemplar.labels for s in families[name].samples if s.exemplar]
            assert examples == [{"trace_id": TRACE}], name
        plain = await scrape(cluster, "text/plain")
        assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert TRACE not in plain.text


async def test_nothing_that_a_client_says_becomes_a_label() -> None:
    said = {"user", "salt-of-mine", "my-own-id", "no-such-model", "from-a-header", "odd-field"}
    async with fake_server(say("hello")) as cluster:
        await complete(cluster, request_id="my-own-id", cache_salt="salt-of-mine", user="user")
        await complete(cluster, model="no-such-model")
        await complete(cluster, **{"odd-field": 1})
        await complete(cluster, max_tokens=10**9)
        text = (await scrape(cluster, "text/plain")).text
    labels = {line for line in text.splitlines() if not line.startswith("#") and "{" in line}
    assert not [line for line in labels for word in said if f'"{word}' in line]
    assert 'baton_requests_total{outcome="model_not_found"} 1.0' in labels


@virtual_time
async def test_outcomes_are_bounded_whatever_workers_send() -> None:
    async with fake_cluster(say("ok")) as cluster:
        metrics = cluster.conductor.metrics
        for number in range(10 * MAX_OUTCOMES):
            metrics.note_outcome(f"code-{number}")
            metrics.note_retry(f"reason-{number}")
        lines = text_of(cluster).splitlines()
    for name in ("baton_requests_total", "baton_attempt_retries_total"):
        found = [line for line in lines if line.startswith(f"{name}{{")]
        assert len(found) <= MAX_OUTCOMES + 2
    assert any(line.startswith('baton_requests_total{outcome="other"}') for line in lines)


@virtual_time
async def test_series_that_alerts_watch_are_there_before_the_first_event() -> None:
    """Or the first increase would not be seen."""
    async with fake_cluster(say("ok"), policy=Policy(slos=Slos(1.0, 0.1))) as cluster:
        lines = set(text_of(cluster).splitlines())
    assert {
        'baton_requests_total{outcome="ok"} 0.0',
        'baton_rejections_total{reason="ttft"} 0.0',
        'baton_retry_refusals_total{reason="budget"} 0.0',
        f'baton_attempt_retries_total{{reason="{WorkerLost.code}"}} 0.0',
        'baton_slo_misses_total{slo="ttft"} 0.0',
        'baton_workers{role="decode",state="dead"} 0.0',
        "baton_kv_resyncs_total 0.0",
        "baton_poison_requests_total 0.0",
    } <= lines


def test_gaps_in_the_news_are_counted_once_each() -> None:
    feed = KvFeed(PrefixMap(100))
    asked: list[Resync] = []
    feed.on_link("p", asked.append)
    assert feed.gaps == 0
    feed.on_message("p", KvSnapshot(0, Tier.GPU, b"", first=True, last=True), asked.append)
    feed.on_message("p", KvEvents(1, Tier.GPU, b"a" * 16), asked.append)
    feed.on_message("p", KvEvents(3, Tier.GPU, b"b" * 16), asked.append)
    feed.on_message("p", KvEvents(4, Tier.GPU, b"c" * 16), asked.append)  # ignored until then
    assert (feed.gaps, len(asked)) == (1, 2)


@virtual_time
async def test_members_are_counted_in_every_state() -> None:
    async with fake_cluster(say("ok"), prefill=2, decode=1) as cluster:
        await asyncio.sleep(0)
        lines = text_of(cluster).splitlines()
    assert 'baton_workers{role="prefill",state="live"} 2.0' in lines
    assert 'baton_workers{role="decode",state="live"} 1.0' in lines
    assert 'baton_workers{role="store",state="live"} 0.0' in lines
    assert len([line for line in lines if line.startswith("baton_workers{")]) == 15
