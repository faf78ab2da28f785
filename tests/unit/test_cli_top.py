"""`baton top`: what it shows, on wide and narrow terminals, and without the right to see all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from rich.console import Console

from baton.cli.top import look
from baton.cli.top_view import MAX_REQUESTS, view
from baton.client.http import Client
from baton.errors import PeerGone
from tests.fake_worker import FakeCluster, fake_server

CLUSTER: dict[str, Any] = {
    "conductors": [
        {"name": "c0", "role": "conductor", "pid": 1, "state": "live", "running": 2}
    ],
    "workers": [
        {
            "name": f"{role}-{number}",
            "role": role,
            "pid": 2,
            "address": "127.0.0.1:50051",
            "state": "live",
            "running": 3,
            "waiting": 0,
            "blocks": {"free": 5, "active": 3, "cached": 2},
        }
        for role in ("prefill", "decode")
        for number in range(2)
    ],
    "stores": [],
}  # fmt: skip
TTFT = {"p50": 0.0123, "p90": 0.2, "p99": 1.5}
PERIOD: dict[str, Any] = {
    "period_s": 60, "requests": 72, "failed": 1, "requests_per_s": 1.2, "tokens_per_s": 80.0,
    "goodput_per_s": 1.1, "prompt_tokens": 1000, "hits": {"own": 500, "cpu": 125, "peer": 0},
    "ttft_s": TTFT, "tpot_s": None,
}  # fmt: skip
FLOW = {"source": "p", "target": "d", "kind": "handoff", "bytes": 3 << 20, "bytes_per_s": 1536.0}
REQUEST: dict[str, Any] = {
    "id": "cmpl-0123456789abcdef01234567", "outcome": "ok", "received_s": 99.0, "ttft_s": 0.05,
    "tpot_s": 0.01, "duration_s": 1.25, "prompt_tokens": 300, "cached_tokens": 288,
    "output_tokens": 64, "prefill": "prefill-0", "decode": "decode-1", "attempts": 1,
}  # fmt: skip
LOOK: dict[str, Any] = {
    **CLUSTER,
    "time_s": 100.0,
    "model": "demo",
    "ready": True,
    "slos": {"ttft_s": 2.0, "tpot_s": None},
    "now": {"requests_per_s": 1.17, "tokens_per_s": 73.9},
    "periods": [PERIOD],
    "flows": [FLOW],
    "requests": [
        REQUEST,
        REQUEST | {"id": "r2", "outcome": "running", "duration_s": None, "tpot_s": None},
        REQUEST | {"id": "r3", "outcome": "worker_lost", "prefill": None},
    ],
}


def text_of(renderable: Any, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    with console.file:
        console.print(renderable)
        return console.export_text()


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with fake_server() as cluster, Client(cluster.url) as client:
        yield client


def test_all_of_a_look() -> None:
    text = text_of(view("http://x", LOOK, 160, None), 160)
    for part in (
        "http://x  demo  ready",
        "TTFT     p50 12.3 ms   p90 200 ms   p99 1.50 s",
        "TPOT     –",
        "goodput  1.1/s   TTFT ≤ 2.00 s",
        "hit rate 62.5%   own pool 50.0%, memory 12.5%",
        "requests 1.17/s, 2 running, 72 in the last minute (1 not answered)",
        "tokens   73.9/s",
        "3/10 blocks in use, 2 cached",
        "KV p → d (handoff): 1.5 KiB/s, 3 MiB in the last minute",
        "cmpl-0123456789abcdef01234567",
        "prefill-0 → decode-1",
    ):
        assert part in text, part
    running = next(line for line in text.splitlines() if line.startswith("r2"))
    assert running.split()[1:5] == ["running", "300", "–", "64"]
    assert running.split()[7:10] == ["–", "1.00", "s"]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = text_of(view("http://127.0.0.1:8000", LOOK, width, None), width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    row = next(line for line in text.splitlines() if line.startswith("r2"))
    assert "running" in row
    assert "decode" in text


def test_as_many_requests_as_there_is_room_for() -> None:
    many = LOOK | {"requests": [REQUEST | {"id": f"r{n:02}"} for n in range(40)]}

    def shown(height: int | None) -> int:
        lines = text_of(view("http://x", many, 120, height), 120).splitlines()
        assert height is None or height < 30 or len(lines) <= height
        return sum(line[:1] == "r" and line[1:3].isdigit() for line in lines)

    assert shown(None) == MAX_REQUESTS
    assert shown(200) == MAX_REQUESTS
    assert 3 <= shown(34) < MAX_REQUESTS
    assert shown(5) == 3


async def test_a_look_at_a_real_conductor(client: Client) -> None:
    seen = await look(client)
    assert seen["model"] == "tiny"
    text = text_of(view(client.url, seen, 80, None), 80)
    assert "no SLO is set" in text
    assert "prefill-0" in text


async def test_without_a_key_the_fleet_is_shown() -> None:
    async with fake_server(api_key=("k",)) as cluster, Client(cluster.url) as client:
        text = text_of(view(client.url, await look(client), 100, None), 100)
        assert "decode-0" in text
        assert "key" in text
        assert "TTFT" not in text
        assert await _with_key(cluster)


async def _with_key(cluster: FakeCluster) -> bool:
    async with Client(cluster.url, api_key="k") as client:
        return "periods" in await look(client)


async def test_no_cluster_is_an_error() -> None:
    async with Client("http://127.0.0.1:1") as client:
        with pytest.raises(PeerGone):
            await look(client)
