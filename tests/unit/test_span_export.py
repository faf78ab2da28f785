"""Traces on their way to a collector: what is in them, what never is; collectors that fail."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import import_module
from itertools import chain

import pytest

from baton.errors import BatonError, ConfigError
from baton.types.request import Span, WireError
from baton.types.trace import TraceContext
from conductor import otlp, span_export
from conductor.config import ConductorConfig
from conductor.otlp import OtlpSender
from conductor.request import Arrival, Ask, Options
from conductor.service import Policy
from conductor.span_export import Sender, SpanExport, Trees
from conductor.span_tree import TreeSpan, span_tree
from conductor.trace import Timeline
from tests.fake_worker import EOS, FakeCluster, Script, Scripts, fake_cluster, say, wait_for
from tests.otlp_collector import Collector, collector
from tests.unit.test_conductor_resume import only_first
from tests.virtual_time import virtual_time

SECRET = "the-secret-prompt-of-a-client"
CALLER = TraceContext("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", True, "a=1")
FAILING = WireError("lease_expired", SECRET, retryable=True)


async def served(cluster: FakeCluster, caller: TraceContext | None = CALLER) -> Timeline:
    """The timeline of a request, whether it fails or not."""
    conductor = cluster.conductor
    arrival = Arrival(asyncio.get_running_loop().time(), caller)
    ask = Ask("tiny", (SECRET,), Options(max_tokens=9, temperature=0.5, stop=("\0" + SECRET,)))
    request = await conductor.prepare(ask, "test", arrival=arrival)
    try:
        async for _ in conductor.generate(request):
            pass
    except BatonError:
        pass
    timeline = conductor.traces.get(request.id)
    assert timeline is not None
    return timeline


def by_name(tree: tuple[TreeSpan, ...]) -> dict[str, TreeSpan]:
    return {span.name: span for span in tree}


@virtual_time
async def test_the_tree_of_a_request() -> None:
    async with fake_cluster(say("hi", prefill_s=2.0, cached_tokens=8)) as cluster:
        spans = by_name(span_tree(await served(cluster)))
    root = spans["text_completion tiny"]
    assert (root.parent_id, root.kind, root.error) == (CALLER.span_id, "server", "")
    assert root.events[0][0] == "first_token"
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": len(SECRET),
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.response.finish_reasons": ("stop",),
    }
    assert root.attributes.items() >= wanted.items()
    assert 2.0 <= float(str(root.attributes["gen_ai.response.time_to_first_chunk"])) < 3.0
    attempt = spans["attempt 0"]
    for name in ("read", "tokenize", "route", "deliver", "attempt 0"):
        assert spans[name].parent_id == root.span_id
    for name in ("dispatch", "prefill", "return", "decode"):
        assert spans[name].parent_id == attempt.span_id
    assert (spans["prefill"].service, spans["prefill"].process) == ("baton-prefill", "prefill-0")
    assert (spans["decode"].service, spans["decode"].process) == ("baton-decode", "decode-0")
    assert attempt.start_s <= spans["prefill"].start_s < spans["prefill"].end_s <= attempt.end_s
    assert len({span.span_id for span in spans.values()}) == len(spans)


@virtual_time
async def test_an_attempt_links_to_the_one_that_failed_before() -> None:
    failing = Script((*b"hi", EOS), prefill_s=1.0, error_at=0, error=FAILING)
    async with fake_cluster(only_first(failing), prefill=2) as cluster:
        spans = by_name(span_tree(await served(cluster, None)))
    first, second = spans["attempt 0"], spans["attempt 1"]
    assert (first.error, first.attributes["error.type"]) == ("lease_expired", "lease_expired")
    assert (second.follows, second.error, first.follows) == (first.span_id, "", "")
    assert spans["text_completion tiny"].parent_id == ""


@virtual_time
async def test_nothing_that_a_client_wrote_is_in_it() -> None:
    error = WireError("internal_error", SECRET)
    for script in (say(SECRET), say(SECRET, error_at=0, error=error), say("", error=error)):
        async with fake_cluster(script) as cluster:
            assert SECRET not in repr(span_tree(await served(cluster)))


def test_names_are_those_of_the_conventions() -> None:
    """Of generative AI, as the installed package lists them."""
    names = import_module("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    known = {value for name, value in vars(names).items() if name.startswith("GEN_AI_")}

    async def used() -> set[str]:
        async with fake_cluster(say("hi")) as cluster:
            tree = span_tree(await served(cluster))
        return set(chain.from_iterable(span.attributes for span in tree))

    found = {name for name in asyncio.run(used()) if name.startswith("gen_ai.")}
    assert found
    assert found <= known


# -- the queue -----------------------------------------------------------------------------


class Kept:
    """A sender that works as `answer` says."""

    def __init__(self, answer: Callable[[], bool] = lambda: True) -> None:
        self.answer = answer
        self.got: list[str] = []
        self.closed = threading.Event()

    def send(self, traces: Trees) -> bool:
        if not self.answer():
            return False
        self.got += [context.trace_id for context, _ in traces]
        return True

    def close(self) -> None:
        self.closed.set()


@pytest.fixture(autouse=True)
def without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "LINGER_S", 0.0)
    monkeypatch.setattr(span_export, "POLL_S", 0.001)


@asynccontextmanager
async def exporting(sender: Sender) -> AsyncIterator[tuple[SpanExport, Counter[str]]]:
    counts: Counter[str] = Counter()
    export = SpanExport(lambda: sender, lambda outcome, n: counts.update({outcome: n}))
    task = asyncio.create_task(export.run())
    try:
        yield export, counts
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=20)
        assert task.cancelled()


async def some_timeline(**changes: object) -> Timeline:
    async with fake_cluster(say("hi")) as cluster:
        timeline = await served(cluster)
    context = replace(timeline.tracing.context, **changes)  # type: ignore[arg-type]
    return replace(timeline, tracing=replace(timeline.tracing, context=context))


async def test_only_what_is_sampled_is_sent() -> None:
    sender = Kept()
    async with exporting(sender) as (export, counts):
        export.note_end(await some_timeline(sampled=False))
        export.note_end(await some_timeline())
        await wait_for(lambda: bool(counts["sent"]))
    assert counts == {"sent": 1}
    assert sender.got == [CALLER.trace_id]
    assert sender.closed.is_set()


async def test_what_waits_at_the_end_is_sent_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_export, "LINGER_S", 1e6)
    sender = Kept()
    async with exporting(sender) as (export, counts):
        await wait_for(lambda: export.running)
        export.note_end(await some_timeline())
    assert counts == {"sent": 1}


async def test_a_collector_that_refuses_or_breaks_is_counted() -> None:
    def broken() -> bool:
        if counts["failed"]:
            raise OSError("gone")
        return False

    async with exporting(Kept(broken)) as (export, counts):
        timeline = await some_timeline()
        for wanted in (1, 2):
            export.note_end(timeline)
            await wait_for(lambda: counts["failed"] == wanted)  # noqa: B023


async def test_behind_a_collector_that_hangs_traces_are_dropped_and_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(span_export, "MAX_WAITING", 3)
    monkeypatch.setattr(span_export, "MAX_BATCH", 1)
    monkeypatch.setattr(span_export, "FLUSH_S", 0.01)
    called = threading.Event()
    sender = Kept()

    def hang() -> bool:
        called.set()
        return not sender.closed.wait(20)

    sender.answer = hang
    async with exporting(sender) as (export, counts):
        timeline = await some_timeline()
        export.note_end(timeline)
        await wait_for(called.is_set)
        for _ in range(5):
            export.note_end(timeline)
        assert counts == {"dropped": 2}
    assert counts == {"dropped": 2 + 2, "failed": 2}  # one was on its way, one was tried at the end


# -- OTLP ----------------------------------------------------------------------------------


@pytest.fixture
def otel() -> Iterator[Collector]:
    with collector() as found:
        yield found


async def test_a_collector_gets_the_whole_trace(
    otel: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=mine")
    open_spans = lambda: OtlpSender(otel.url, "blue", "conductor-7")  # noqa: E731
    policy = Policy(trace_sample=1.0)
    async with exporting_cluster(say("hi"), policy, open_spans) as cluster:
        timeline = await served(cluster)
        await wait_for(lambda: len(otel.trace(CALLER.trace_id)) == len(span_tree(timeline)))
    spans = {span.name: span for span in otel.trace(CALLER.trace_id)}
    root = spans["text_completion tiny"]
    assert (root.parent_id, root.state, root.events) == (CALLER.span_id, "a=1", ("first_token",))
    assert root.resource["service.name"] == "baton-conductor"
    assert root.resource["service.instance.id"] == "conductor-7"
    assert root.resource["service.namespace"] == "blue"
    assert spans["decode"].resource["service.instance.id"] == "decode-0"
    assert spans["decode"].parent_id == spans["attempt 0"].span_id
    assert root.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert otel.metadata[0]["x-tenant"] == "mine"
    assert not any(SECRET.encode() in raw for raw in otel.raw)


@asynccontextmanager
async def exporting_cluster(
    script: Scripts, policy: Policy, open_spans: Callable[[], Sender]
) -> AsyncIterator[FakeCluster]:
    async with fake_cluster(script, policy=policy) as cluster:
        conductor = cluster.conductor
        export = SpanExport(open_spans, conductor.metrics.note_export)
        conductor._spans = export
        task = asyncio.create_task(export.run())
        yield cluster
        task.cancel()
        await asyncio.wait([task], timeout=20)


async def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "EXPORT_TIMEOUT_S", 0.2)
    sender = OtlpSender("http://127.0.0.1:9", "", "c")
    async with exporting(sender) as (export, counts):
        export.note_end(await some_timeline())
        await wait_for(lambda: counts["failed"] == 1)


async def test_a_collector_that_hangs_does_not_hold_the_end_up(
    otel: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "EXPORT_TIMEOUT_S", 1e4)
    monkeypatch.setattr(span_export, "FLUSH_S", 0.01)
    otel.answers.clear()
    sender = OtlpSender(otel.url, "", "c")
    async with exporting(sender) as (export, counts):
        export.note_end(await some_timeline())
        await wait_for(otel.called.is_set)
    assert counts == {"failed": 1}
    await wait_for(lambda: not any(t.name.startswith("spans") for t in threading.enumerate()))


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="trace-sample"):
        ConductorConfig(trace_sample=1.5)
    with pytest.raises(ConfigError, match="otlp-endpoint"):
        ConductorConfig(otlp_endpoint="collector:4317")


def test_counts_of_workers_are_attributes() -> None:
    async def spans() -> dict[str, TreeSpan]:
        async with fake_cluster(say("hi")) as cluster:
            timeline = await served(cluster)
            attempt = str(timeline.first_by)
            told = Span("transfer", 1.0, 2.0, (("blocks", 3), ("bytes", 4096)))
            timeline.add_span("decode-0", attempt, told)
            return by_name(span_tree(timeline))

    transfer = asyncio.run(spans())["transfer"]
    assert transfer.attributes == {"baton.blocks": 3, "baton.bytes": 4096}
