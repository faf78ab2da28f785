"""What a request's timeline attributes its TTFT to, with fake workers in virtual time."""

from __future__ import annotations

from typing import Any

from baton.errors import BatonError
from baton.types.request import Span, WireError
from conductor.trace import Timeline
from conductor.trace_json import timeline_json
from tests.fake_worker import EOS, FakeCluster, Script, fake_cluster, say
from tests.unit.test_conductor_dispatch import ask
from tests.unit.test_conductor_resume import only_first
from tests.virtual_time import virtual_time

FAILING = WireError("lease_expired", "too late", retryable=True)
SLOW = say("hi", prefill_s=2.0)


def only(cluster: FakeCluster) -> Timeline:
    (timeline,) = cluster.conductor.traces._timelines.values()
    return timeline


def told(cluster: FakeCluster) -> tuple[dict[str, Any], dict[str, float]]:
    body = timeline_json(only(cluster), now_s=0.0)
    return body, {stage["name"]: stage["seconds"] for stage in body["ttft_stages"]}


@virtual_time
async def test_every_second_until_the_first_token_has_a_stage() -> None:
    async with fake_cluster(SLOW) as cluster:
        await ask(cluster.conductor)
        body, stages = told(cluster)
    before, behind = ("read", "tokenize", "route"), ("dispatch", "prefill", "return", "deliver")
    assert tuple(stages) == before + behind
    assert abs(stages["prefill"] - 2.0) < 1e-6
    assert body["ttft_attributed"] == 1.0
    assert abs(sum(stages.values()) - body["ttft_s"]) < 1e-6
    assert 2.0 <= body["ttft_s"] < 3.0
    assert body["ended_s"] >= body["received_s"] + body["ttft_s"]


@virtual_time
async def test_attempts_that_brought_nothing_are_a_stage() -> None:
    failing = Script((*b"hi", EOS), prefill_s=3.0, error_at=0, error=FAILING)
    async with fake_cluster(only_first(failing), prefill=2) as cluster:
        await ask(cluster.conductor)
        body, stages = told(cluster)
    first, second = body["attempts"]
    assert 3.0 <= stages["retries"] < 3.5
    assert abs(stages["retries"] - (second["sent_s"] - first["sent_s"])) < 1e-6
    assert (first["first_token_s"], second["ended"]) == (None, "complete")
    assert first["ended"].startswith("lease_expired")
    assert body["ttft_attributed"] == 1.0


@virtual_time
async def test_without_a_token_the_stages_end_with_the_request() -> None:
    hopeless = say("", prefill_s=1.0, error_at=0, error=WireError("internal", "broken"))
    async with fake_cluster(hopeless) as cluster:
        try:
            await ask(cluster.conductor)
        except BatonError:
            body, stages = told(cluster)
    assert body["ttft_s"] is None
    assert body["ttft_attributed"] is None
    assert list(stages) == ["read", "tokenize", "route"]


@virtual_time
async def test_a_worker_whose_clock_is_wrong_has_its_time_all_the_same() -> None:
    async with fake_cluster(SLOW) as cluster:
        await ask(cluster.conductor)
        timeline = only(cluster)
        timeline.spans = [
            (source, attempt, Span(span.name, span.start_s - 500, span.end_s - 500))
            for source, attempt, span in timeline.spans
            if source != "conductor"
        ]
        _, stages = told(cluster)
    assert abs(stages["prefill"] - 2.0) < 1e-6


@virtual_time
async def test_the_second_token_waits_for_the_handoff() -> None:
    async with fake_cluster(say("hi")) as cluster:
        await ask(cluster.conductor)
        timeline = only(cluster)
        assert timeline.first_by is not None
        heard_s = timeline.attempts[timeline.first_by].heard_s or 0.0
        handoff = Span("handoff", heard_s - 0.25, heard_s + 0.5)
        timeline.ended_s = heard_s + 1.0
        timeline.add_span("prefill-0", str(timeline.first_by), handoff)
        body, _ = told(cluster)
    (exposed,) = body["second_token_stages"]
    assert (exposed["name"], round(exposed["seconds"], 6)) == ("exposed_transfer", 0.5)
