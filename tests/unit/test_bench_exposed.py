"""What `baton bench handoff` makes of a cluster's traces."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from baton.bench import exposed
from baton.client.http import Client
from baton.errors import ConfigError


def trace(prefill: str | None, *spans: tuple[str, str, float, float]) -> dict[str, Any]:
    return {
        "attempts": [{"prefill": prefill, "decode": "decode-0"}],
        "spans": [
            {"source": source, "name": name, "start_s": start, "end_s": end}
            for source, name, start, end in spans
        ],
    }


FIRST = ("conductor", "first_token", 10.0, 11.0)
PREFILL = ("prefill-0", "prefill", 10.1, 10.9)
HANDOFF = ("prefill-0", "handoff", 10.9, 10.95)
DECODE = ("decode-0", "prefill", 10.95, 10.95)


class Cluster:
    """Answers like a conductor whose worker's spans come with the second look."""

    def __init__(self, *traces: dict[str, Any]) -> None:
        self._traces = list(traces)
        self.prompts: list[list[int]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "demo"}]})
        if request.url.path.startswith("/trace/"):
            kept = self._traces.pop(0) if len(self._traces) > 1 else self._traces[0]
            return httpx.Response(200, json=kept)
        self.prompts.append(json.loads(request.content)["prompt"])
        choice = {"id": "r", "choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}
        return httpx.Response(200, text=f"data: {json.dumps(choice)}\n\ndata: [DONE]\n\n")


async def measured(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, lengths: tuple[int, ...]
) -> tuple[exposed.Exposure, ...]:
    def connect(url: str, **options: Any) -> Client:
        return Client(url, transport=httpx.MockTransport(cluster), **options)

    monkeypatch.setattr(exposed, "Client", connect)
    ended: list[tuple[int, int]] = []
    found = await exposed.measure(
        "http://cluster", lengths, 2, 50, lambda done, total: ended.append((done, total))
    )
    assert ended == [(i, 2 * len(lengths)) for i in range(1, 2 * len(lengths) + 1)]
    return found


async def test_exposed_is_what_follows_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(
        trace("prefill-0", FIRST, PREFILL), trace("prefill-0", FIRST, DECODE, PREFILL, HANDOFF)
    )
    found = await measured(monkeypatch, cluster, (8, 16))
    assert [e.input_tokens for e in found] == [8, 16]
    assert [len(prompt) for prompt in cluster.prompts] == [8, 8, 16, 8, 16]  # the first warms up
    assert all(0 <= token < 50 for prompt in cluster.prompts for token in prompt)
    for exposure in found:
        assert exposure.requests == 2
        assert exposure.ttft_s == pytest.approx(1.0)
        assert exposure.prefill_s == pytest.approx(0.8)
        assert exposure.exposed_s == pytest.approx(0.05)
        assert exposure.share_of_ttft == pytest.approx(0.05)
    assert exposed.table(found).row_count == 2


async def test_a_cluster_that_hands_nothing_over_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match="nothing was handed over"):
        await measured(monkeypatch, Cluster(trace(None, FIRST)), (8,))
