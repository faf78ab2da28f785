"""The live page at `/`, its files, and what it shows: `GET /live` (events), `GET /live.json`.

The page is plain HTML, CSS and modules out of this package, and asks nobody else for anything: its
policy allows no other source, no inline script, and no text that becomes markup.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from baton.errors import Overloaded
from conductor.cluster import ConductorIdentity
from conductor.http_errors import error_response
from conductor.http_generate import until_gone
from conductor.live_view import LiveView
from conductor.service import Conductor

MAX_VIEWERS = 64
SEND_S = 10.0  # until a viewer that does not read is cut off
RETRY_S = 15.0  # when there are too many of them

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "cache-control": "no-cache",  # kept, and asked for again with its ETag
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'; require-trusted-types-for 'script'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_LIVE_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def page_routes() -> list[Route]:
    """The page itself, which tells nothing about the cluster."""
    directory = files("conductor") / "page"
    found = {path.name: _File.read(path) for path in directory.iterdir() if path.is_file()}
    routes = [_file_route(f"/page/{name}", file) for name, file in sorted(found.items())]
    return [_file_route("/", found["index.html"]), *routes]


def live_routes(conductor: Conductor, identity: ConductorIdentity) -> list[Route]:
    """What it shows."""
    view = LiveView(conductor, identity)
    viewers = Viewers()

    async def events(_request: Request) -> Response:
        return LiveResponse(conductor, view, viewers)

    async def once(_request: Request) -> Response:
        return Response(view.snapshot(), headers=_LIVE_HEADERS, media_type="application/json")

    return [Route("/live", events), Route("/live.json", once)]


@dataclass(slots=True)
class Viewers:
    count: int = 0


class LiveResponse(Response):
    """Server-sent events: what the cluster looks like, at every tick. It ends when the conductor
    does, when the client goes, and when it stops reading."""

    def __init__(self, conductor: Conductor, view: LiveView, viewers: Viewers) -> None:
        super().__init__(headers=_LIVE_HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["x-accel-buffering"] = "no"
        self._live = conductor.live
        self._view = view
        self._viewers = viewers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await self._begin(send)
            await send({"type": "http.response.body", "body": b""})
            return
        if self._viewers.count >= MAX_VIEWERS:
            full = Overloaded(f"{MAX_VIEWERS} viewers look at the cluster already", RETRY_S)
            await error_response(full)(scope, receive, send)
            return
        self._viewers.count += 1
        try:
            await until_gone(receive, self._stream(send))
        except TimeoutError:
            return  # it does not read
        finally:
            self._viewers.count -= 1

    async def _stream(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        await self._begin(send)
        while not self._live.closed:
            body = b"data: " + self._view.snapshot() + b"\n\n"
            async with asyncio.timeout(SEND_S):
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await self._live.wait_closed(max(self._view.next_at - clock(), 0.01))
        await send({"type": "http.response.body", "body": b"event: end\ndata: {}\n\n"})

    async def _begin(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Traversable) -> _File:
        body = path.read_bytes()
        etag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'
        return cls(body, _TYPES[path.name.rpartition(".")[2]], etag)


def _file_route(path: str, file: _File) -> Route:
    headers = {**_HEADERS, "etag": file.etag, "content-type": file.media_type}

    async def give(request: Request) -> Response:
        known = request.headers.get("if-none-match", "")
        if file.etag in known or known.strip() == "*":
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers)

    return Route(path, give)
