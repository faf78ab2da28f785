"""The live page's files and its stream: headers, bounds, endings, keys."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Message

import conductor
from baton.types.request import WireError
from conductor import http_live
from conductor.cluster import ConductorIdentity
from conductor.http import make_app
from conductor.live_view import TICK_S
from tests.fake_worker import FakeCluster, fake_cluster, fake_server, wait_for
from tests.virtual_time import settle, virtual_time

PAGE = Path(conductor.__file__).parent / "page"
IDENTITY = ConductorIdentity("c", 1, "life", "127.0.0.1:1", "127.0.0.1:2", 0.0)


def client_of(cluster: FakeCluster, key: str = "") -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else None
    return httpx.AsyncClient(base_url=cluster.url, trust_env=False, timeout=20, headers=headers)


class Viewer:
    """Who asks the app for `GET /live` and reads until it leaves; `stuck` reads nothing."""

    def __init__(self, app: Any, method: str = "GET", stuck: bool = False) -> None:
        self.messages: list[Message] = []
        self.gone = asyncio.Event()
        self._stuck = stuck
        scope = {
            "type": "http", "method": method, "path": "/live", "raw_path": b"/live",
            "query_string": b"", "headers": [], "root_path": "", "http_version": "1.1",
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def looks(self) -> list[bytes]:
        return [m["body"] for m in self.messages[1:] if m["body"].startswith(b"data: ")]

    async def _receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._stuck and self.messages:
            await asyncio.Event().wait()
        self.messages.append(message)


async def test_every_file_has_its_type_and_the_policy() -> None:
    async with fake_server() as cluster, client_of(cluster) as client:
        for path in [*PAGE.iterdir(), PAGE / ""]:
            url = "/" if path == PAGE else f"/page/{path.name}"
            response = await client.get(url)
            assert response.status_code == 200, url
            kind = http_live._TYPES["html" if url == "/" else path.suffix[1:]]
            assert response.headers["content-type"] == kind
            policy = response.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
            head = await client.head(url)
            assert (head.status_code, head.content) == (200, b"")
            assert head.headers["content-length"] == response.headers["content-length"]
        assert (await client.get("/page/../config.py")).status_code == 404
        assert (await client.post("/")).status_code == 405


async def test_a_file_that_is_known_is_not_sent_again() -> None:
    async with fake_server() as cluster, client_of(cluster) as client:
        etag = (await client.get("/")).headers["etag"]
        for known, status in [(etag, 304), (f'"x", W/{etag}', 304), ("*", 304), ('"x"', 200)]:
            response = await client.get("/", headers={"if-none-match": known})
            assert response.status_code == status, known
            assert response.headers["etag"] == etag


def test_the_page_asks_nobody_else_and_makes_no_markup_of_data() -> None:
    for path in PAGE.iterdir():
        text = path.read_text()
        assert not re.search(r"(src|href)=\"(https?:)?//", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert "@import" not in text
        assert len(text.splitlines()) <= 300, path.name
    page = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page)
    named = set(re.findall(r'(?:src|href)="page/([^"]+)"', page))
    named |= {m for p in PAGE.glob("*.js") for m in re.findall(r'from "\./([^"]+)"', p.read_text())}
    assert named | {"index.html"} == {path.name for path in PAGE.iterdir()}


async def test_one_look_as_json() -> None:
    async with fake_server() as cluster, client_of(cluster) as client:
        response = await client.get("/live.json")
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"
        look = response.json()
        assert [worker["name"] for worker in look["workers"]] == ["decode-0", "prefill-0"]
        assert (look["model"], look["ready"]) == ("tiny", True)


async def test_the_page_is_open_and_what_it_shows_is_not() -> None:
    async with fake_server(api_key=("k",)) as cluster:
        async with client_of(cluster) as client:
            assert (await client.get("/")).status_code == 200
            assert (await client.get("/page/app.js")).status_code == 200
            assert (await client.get("/live")).status_code == 401
            assert (await client.get("/live.json")).status_code == 401
        async with client_of(cluster, "k") as client:
            assert (await client.get("/live.json")).status_code == 200
            async with client.stream("GET", "/live") as response:
                assert response.status_code == 200


async def test_the_stream_over_a_socket_ends_with_the_conductor() -> None:
    async with fake_server() as cluster, client_of(cluster) as client:
        async with client.stream("GET", "/live") as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["x-accel-buffering"] == "no"
            lines = response.aiter_lines()
            first = await anext(lines)
            assert json.loads(first.removeprefix("data: "))["conductors"][0]["state"] == "live"
            assert cluster.server is not None
            cluster.server.stop()
            rest = [line async for line in lines]
        assert rest[-3:-1] == ["event: end", "data: {}"]


async def test_a_viewer_that_goes_makes_room() -> None:
    async with fake_server() as cluster, client_of(cluster) as client:
        for _ in range(3):
            async with client.stream("GET", "/live") as response:
                await anext(response.aiter_lines())
        assert (await client.get("/health")).status_code == 200


@virtual_time
async def test_all_viewers_get_the_same_look_at_each_tick() -> None:
    async with fake_cluster() as cluster:
        app = make_app(cluster.conductor, IDENTITY, 1000)
        one = Viewer(app)
        await asyncio.sleep(TICK_S / 2)
        two = Viewer(app)
        await asyncio.sleep(3 * TICK_S)
        assert len(one.looks) == 4
        assert one.looks == two.looks
        one.gone.set()
        await one.task
        cluster.conductor.live.close()
        await two.task
        assert two.messages[-1]["body"] == b"event: end\ndata: {}\n\n"
        late = Viewer(app)
        await late.task
        assert late.looks == []


@virtual_time
async def test_viewers_are_bounded() -> None:
    async with fake_cluster() as cluster:
        app = make_app(cluster.conductor, IDENTITY, 1000)
        viewers = [Viewer(app) for _ in range(http_live.MAX_VIEWERS)]
        await settle()
        one_more = Viewer(app)
        await one_more.task
        assert one_more.status == 429
        assert (b"retry-after", b"15") in one_more.messages[0]["headers"]
        viewers[0].gone.set()
        await viewers[0].task
        again = Viewer(app)
        await settle()
        assert again.status == 200
        for viewer in (*viewers, again):
            viewer.gone.set()
            await viewer.task


@virtual_time
async def test_a_viewer_that_does_not_read_is_cut_off() -> None:
    async with fake_cluster() as cluster:
        app = make_app(cluster.conductor, IDENTITY, 1000)
        stuck = Viewer(app, stuck=True)
        await asyncio.sleep(http_live.SEND_S + 1)
        assert stuck.task.done()
        await stuck.task


@virtual_time
async def test_head_of_the_stream_ends_at_once() -> None:
    async with fake_cluster() as cluster:
        viewer = Viewer(make_app(cluster.conductor, IDENTITY, 1000), method="HEAD")
        await viewer.task
        assert [message.get("body") for message in viewer.messages] == [None, b""]


async def test_a_failed_request_is_shown_as_such() -> None:
    def fail(_task: object) -> Any:
        from tests.fake_worker import Script

        return Script((1, 2), error_at=0, error=WireError("bad_luck", "no luck", retryable=False))

    async with fake_server(fail) as cluster, client_of(cluster) as client:
        await client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        await wait_for(lambda: cluster.conductor.running == 0)
        look = (await client.get("/live.json")).json()
        assert look["periods"][0]["failed"] == 1
        assert look["requests"][0]["outcome"] not in ("ok", "running")
