"""The HTTP API by its own document: what it allows, what it forbids, and what no document says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.cluster.conftest import Cluster, serve
from tests.fake_worker import FakeCluster, echo, fake_server
from tests.fuzz.campaign import MINUTES, Campaign, ErrorLog
from tests.fuzz.grpc_peer import Growth, Host

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
PATIENCE_S = 60.0
START_S = 240.0  # long runs are made on busy machines
SHORT = 8  # tokens that a real model generates for a case

# Errors in bodies that the document allows: what it says in words only.
TOGETHER = {
    "context_length_exceeded": None,
    "unsupported_parameter": None,
    "invalid_request_error": {
        "Last-Event-ID", "logit_bias", "max_completion_tokens", "min_tokens", "n", "prompt",
        "stream_options", "top_logprobs",
    },
}  # fmt: skip


def cases(document: dict[str, Any]) -> st.SearchStrategy[Case]:
    found = []
    for result in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = result.ok()
        found.append(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        if operation.body or operation.headers:
            found += [operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)] * 2
    return st.one_of(found)


def check_case(case: Case, response: Any) -> None:
    case.validate_response(response, checks=CHECKS)
    positive = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    if positive and response.status_code == 400:
        error = response.json()["error"]
        if "must be a whole number, not" in error["message"]:
            return  # 1.0 is an integer to JSON Schema; here it has to be written as one
        known = TOGETHER.get(error["code"], set())
        assert known is None or error["param"] in known, (case.body, error)


def test_api(campaign: Campaign, errors: ErrorLog) -> None:
    """A conductor with fake workers."""
    growth = Growth()
    with Host(fake_server(echo)) as host:
        cluster = host.made
        document = httpx_get(host, cluster, "/openapi.json")

        async def play(case: Case) -> None:
            call: Callable[[], Any] = lambda: case.call(  # noqa: E731
                base_url=cluster.url, timeout=PATIENCE_S
            )
            response = await asyncio.to_thread(call)
            await asyncio.to_thread(check_case, case, response)
            await cluster.check_nothing_left()
            growth.check()
            errors.check()

        campaign.run(cases(document), lambda case: host.run(play(case)), examples=40)
    errors.check()


def httpx_get(host: Host[FakeCluster], cluster: FakeCluster, path: str) -> Any:
    answers: list[Any] = []

    async def get() -> None:
        async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as client:
            answers.append((await client.get(path)).json())

    host.run(get())
    return answers[0]


@pytest.mark.cluster
@pytest.mark.skipif(not MINUTES, reason="starts real processes: only in long runs")
def test_api_of_real_processes(campaign: Campaign, tmp_path: Path) -> None:
    """The demo model on one prefill and one decode worker. Afterwards nothing of it is left."""
    flags = ("--kv-memory-mib", "64")
    with serve(tmp_path / "cluster", *flags, start_s=START_S) as cluster:
        document = cluster.get("/openapi.json").json()
        before = open_files(cluster)

        def play(case: Case) -> None:
            shorten(case)
            check_case(case, case.call(base_url=cluster.url, timeout=PATIENCE_S))
            assert cluster.process.poll() is None
            assert not [line for line in cluster.stderr if "Traceback" in line or "ERROR" in line]

        campaign.run(cases(document), play, examples=40)
        cluster.assert_idle()
        body = {"model": cluster.ready["model"], "prompt": "def f(", "max_tokens": 4}
        assert cluster.post("/v1/completions", body).status_code == 200
        for pid, count in open_files(cluster).items():
            assert count <= before[pid] + 30


def open_files(cluster: Cluster) -> dict[int, int]:
    return {pid: len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in cluster.pids()}


def shorten(case: Case) -> None:
    """A case is to last milliseconds, not as long as a context takes."""
    body = case.body
    if isinstance(body, dict) and ("prompt" in body or "messages" in body):
        for name in ("max_tokens", "max_completion_tokens", "n"):
            if type(body.get(name)) is int and body[name] > SHORT:
                body[name] = SHORT
        if case.path.startswith("/v1/") and not body.keys() & {
            "max_tokens", "max_completion_tokens"
        }:  # fmt: skip
            body["max_tokens"] = SHORT


# -- what the document cannot say ------------------------------------------------------------------

TOKENS = st.text(alphabet="cmplabcdef0123456789.:~-e", max_size=60) | st.sampled_from(
    ["", ":", "a.0123456789abcdef:0:0", "a.0123456789abcdef:ffffffffffffffff:999999999e"]
)


@st.composite
def _changed_token(draw: Any) -> tuple[str, str]:
    """How a real token is changed: a part of it, and what it becomes."""
    part = draw(st.sampled_from(["key", "seed", "counts", "all"]))
    return part, draw(
        TOKENS
        | st.sampled_from(
            ["0", "1", "3", "999999999", "0e", "5e", "999999999e", "0.0", "1.1e", "f" * 16]
        )
    )


def test_last_event_id(campaign: Campaign, errors: ErrorLog) -> None:
    """Clients come back with any id, for any stream: the rest of an answer, or a clear error."""
    with Host(fake_server(echo)) as host:
        cluster = host.made
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "stream": True}

        async def play(change: tuple[str, str]) -> None:
            async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as client:
                first = await client.post("/v1/completions", json=body)
                ids = [line[4:] for line in first.text.splitlines() if line.startswith("id: ")]
                key, seed, counts = ids[1].rsplit(":", 2)
                parts = {"key": key, "seed": seed, "counts": counts}
                part, value = change
                token = value if part == "all" else ":".join((parts | {part: value}).values())
                headers = {"Last-Event-ID": token}
                again = await client.post("/v1/completions", json=body, headers=headers)
                assert again.status_code in (200, 400, 404), again.text
                if again.status_code == 200:
                    assert again.text.endswith("data: [DONE]\n\n")
                    assert '"error"' not in again.text, (token, again.text)
            await cluster.check_nothing_left()
            errors.check()

        campaign.run(_changed_token(), lambda change: host.run(play(change)), examples=40)


HEADERS = st.dictionaries(
    st.sampled_from(["authorization", "content-type", "last-event-id", "accept", "content-encoding",
                     "transfer-encoding", "expect", "x-request-id"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.strip),
    max_size=3,
)  # fmt: skip
BODIES = st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode(errors="surrogatepass"))  # Infinity and NaN, too
PATHS = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/trace/", "/v1/x",
         "/v1/models/%00", "/trace/%ff%fe", "/cluster?x=%zz", "/v1/models/../../etc"]  # fmt: skip


def test_any_bytes(campaign: Campaign, errors: ErrorLog) -> None:
    """Methods, paths, headers and bodies of which the document knows nothing."""
    with Host(fake_server(echo, api_key=("key",))) as host:
        cluster = host.made

        async def play(drawn: tuple[str, str, dict[str, str], bytes]) -> None:
            method, path, headers, body = drawn
            async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as client:
                headers = {"authorization": "Bearer key", **headers}
                if "transfer-encoding" in headers:
                    headers["transfer-encoding"] = "chunked"
                answer = await client.request(method, path, headers=headers, content=body)
                assert answer.status_code < 500, answer.text
                assert (await client.get("/health")).status_code == 200
            await cluster.check_nothing_left()
            errors.check()

        methods = st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE", "PATCH", "X"])
        drawn = st.tuples(methods, st.sampled_from(PATHS), HEADERS, BODIES)
        campaign.run(drawn, lambda case: host.run(play(case)), examples=40)
