"""A real request's trace, from its client through both workers to a collector."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.cluster.conftest import Cluster, serve
from tests.otlp_collector import Collector, Got, collector

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

PATIENCE_S = 60.0
CALLER = "b7ad6b7169203331"
SECRET = "zanzibar"  # the demo model writes code: it does not say this by itself
PROMPT = f"def {SECRET}(n):\n" + "    n = n + 1\n" * 60

CONDUCTOR = {"read", "tokenize", "route", "deliver"}
BETWEEN = {"dispatch", "return"}
PREFILL = {"queue", "prefill", "handoff"}
DECODE = {"attach", "reserve", "transfer", "release", "decode", "first_step"}


@dataclass(frozen=True, slots=True)
class Traced:
    cluster: Cluster
    collector: Collector

    def ask(self, number: int, flags: str = "01", **options: Any) -> tuple[str, str]:
        """(request id, trace id) of a stream that was read to its end."""
        trace_id = f"{number:032x}"
        request_id = f"request-{number}"
        body = {"model": "demo", "prompt": PROMPT, "request_id": request_id, "max_tokens": 8}
        body |= {"stream": True, "ignore_eos": True, "temperature": 0, **options}
        headers = {"traceparent": f"00-{trace_id}-{CALLER}-{flags}", "tracestate": "a=1"}
        answer = httpx.post(
            self.cluster.url + "/v1/completions",
            json=body,
            headers=headers,
            timeout=100.0,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        return request_id, trace_id

    def spans(self, trace_id: str) -> list[Got]:
        until(lambda: bool(self.collector.trace(trace_id)))
        return self.collector.trace(trace_id)


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with pytest.MonkeyPatch.context() as patch, collector() as found:
        patch.setenv("BATON_LOG_LEVEL", "debug")
        flags = ("--kv-memory-mib", "64", "--local-prefill-tokens", "0")
        flags += ("--otlp-endpoint", found.url)
        home = tmp_path_factory.mktemp("traced") / "home"
        with serve(home, *flags, log_lines=100_000) as cluster:
            yield Traced(cluster, found)


def test_one_trace_goes_through_every_process(traced: Traced) -> None:
    _, trace_id = traced.ask(1)
    spans = traced.spans(trace_id)
    by_name = {span.name: span for span in spans}
    assert len(by_name) == len(spans)
    assert set(by_name) == (
        CONDUCTOR | BETWEEN | PREFILL | DECODE | {"text_completion demo", "attempt 0"}
    )
    root, attempt = by_name["text_completion demo"], by_name["attempt 0"]
    assert (root.parent_id, root.state, root.error) == (CALLER, "a=1", "")
    assert {by_name[name].parent_id for name in CONDUCTOR} == {root.span_id}
    assert attempt.parent_id == root.span_id
    assert {by_name[name].parent_id for name in BETWEEN | PREFILL | DECODE} == {attempt.span_id}
    for names, process in (
        (CONDUCTOR, "conductor-0"),
        (PREFILL, "prefill-0"),
        (DECODE, "decode-0"),
    ):
        assert {by_name[name].resource["service.instance.id"] for name in names} == {process}
    for span in spans:
        assert root.start_ns <= span.start_ns <= span.end_ns
    assert by_name["prefill"].end_ns <= by_name["first_step"].start_ns
    assert (
        by_name["prefill"].attributes["baton.tokens"]
        == root.attributes["gen_ai.usage.input_tokens"]
    )
    assert by_name["transfer"].attributes["baton.bytes"] > 0
    assert by_name["decode"].attributes["baton.tokens"] == 8


def test_the_stages_add_up_to_the_ttft(traced: Traced) -> None:
    """Of prompts that are computed, and of one that is cached."""
    for number, options in ((2, {"prompt": PROMPT + "x"}), (3, {}), (4, {"prompt": "def f"})):
        request_id, trace_id = traced.ask(number, **options)
        traced.spans(trace_id)  # until all spans of workers have come
        told = traced.cluster.get(f"/trace/{request_id}").json()
        assert told["trace_id"] == trace_id
        stages = told["ttft_stages"]
        assert {"tokenize", "route", "queue", "prefill", "deliver"} <= {s["name"] for s in stages}
        reached = told["received_s"]
        for stage in stages:
            assert reached <= stage["start_s"] <= stage["end_s"]
            reached = stage["end_s"]
        assert reached <= told["received_s"] + told["ttft_s"] + 1e-6
        assert sum(s["seconds"] for s in stages) == pytest.approx(
            told["ttft_attributed"] * told["ttft_s"], abs=1e-6
        )
        shown = traced.cluster.cli("trace", request_id)
        assert shown.returncode == 0
        assert "% attributed" in shown.stdout
        assert "exposed transfer" in shown.stdout


def test_a_client_that_does_not_sample_is_not_exported(traced: Traced) -> None:
    _, unsampled = traced.ask(5, flags="00")
    _, sampled = traced.ask(6)
    traced.spans(sampled)  # which ended later
    assert not traced.collector.trace(unsampled)


def test_a_secret_is_in_no_span_and_no_log(traced: Traced) -> None:
    """Every process logs everything that it has to say, and names the trace with it."""
    request_id, trace_id = traced.ask(7, stop=[SECRET + "!"])
    traced.spans(trace_id)
    traced.cluster.post("/v1/completions", {"model": SECRET, "prompt": SECRET})
    traced.cluster.post("/v1/completions", {"model": "demo", "prompt": SECRET, SECRET: 1})
    assert not any(SECRET.encode() in raw for raw in traced.collector.raw)
    assert SECRET not in json.dumps(traced.cluster.get(f"/trace/{request_id}").json())
    lines = list(traced.cluster.stderr)
    assert not [line for line in lines if SECRET in line]
    for process in ("prefill-0", "decode-0"):
        assert [line for line in lines if process in line and f"trace={trace_id}" in line]
