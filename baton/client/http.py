"""Streamed completions, fleet status and traces from a running cluster."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import quote

import httpx
import orjson

from baton.client.errors import error_from, error_in
from baton.client.reconnect import may_go_on, pause_before
from baton.client.sse import Event, EventParser
from baton.client.trust import CA_FLAG, CA_VARIABLE
from baton.errors import (
    BatonError,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    Overloaded,
    PeerGone,
)

DEFAULT_URL = "http://127.0.0.1:8000"
SILENT_BEATS = 3  # signs of life that may be missing
KEEPALIVE_HEADER = "x-keepalive-interval"  # seconds in which a stream sends something, if only that

_DONE = b"[DONE]"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream. `usage` comes once, with the last event."""

    text: str = ""
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None
    request_id: str = ""
    token_ids: tuple[int, ...] = ()  # only when `return_token_ids` was asked for


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to ask: text, token ids, or (with `chat`) messages of {role, content}.

    `options` are further request fields as the HTTP API names them (temperature, seed, stop, …).
    """

    content: str | tuple[int, ...] | tuple[Mapping[str, str], ...]
    max_tokens: int | None = None
    chat: bool = False
    model: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else list(self.content)
        body: dict[str, Any] = {
            "model": self.model or model,
            "messages" if self.chat else "prompt": content,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.options,
        }
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        return body


class Client:
    """Use as an async context manager. Every method raises a BatonError when it fails.

    `timeout_s` bounds the wait for a connection and for each next event of a stream, not a whole
    stream. `api_key` is sent when it is not empty. A `url` without a scheme means http; there may
    be several of one cluster, with commas between them. A stream that breaks goes on at the next
    one, or at the same one when it is back. Where there is a next one, a stream that misses three
    of the signs of life that the server has promised counts as broken. One that is refused because
    the cluster has too much to do is asked again when the answer said, as long as all of that is at
    most `patience_s`. `tls` says which certificates are trusted, when not those of the system.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        timeout_s: float = 120.0,
        api_key: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
        patience_s: float = 0.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._urls = [_with_scheme(part.strip()) for part in url.split(",") if part.strip()]
        if not self._urls:
            raise ConfigError("--url is empty: give an address as http://host:port")
        self._at = 0  # which of them is in use
        self._model = ""
        self._timeout_s = timeout_s
        self._silence_s = timeout_s  # that a stream may have, by what the server has promised
        self._patience_s = patience_s
        # Proxies of the environment are for the outside world; a cluster is addressed directly.
        self._http = httpx.AsyncClient(
            headers={"authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=self._timeouts(timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            transport=transport,
            trust_env=False,
            verify=True if tls is None else tls,
        )

    @property
    def url(self) -> str:
        """The address in use."""
        return self._urls[self._at]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every connection. Only for those who do not use the context manager."""
        await self._http.aclose()

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        """The answer as it is generated. Closing the iterator early cancels the request.

        Each piece comes once, however often the connection is lost.
        """
        content = orjson.dumps(prompt.body("" if prompt.model else await self.default_model()))
        last_id, failures, waited_s = "", 0, 0.0
        at = self._at  # its own way round: others may be going, too
        while True:
            url = self._urls[at]
            try:
                async with aclosing(self._events(url + prompt.path, content, last_id)) as events:
                    async for event in events:
                        if event.data == _DONE:
                            return
                        pieces = _pieces(event.data, prompt.chat)
                        last_id, failures = event.id or last_id, 0
                        for piece in pieces:
                            yield piece
                raise PeerGone(f"{url} ended the stream before the answer was complete")
            except BatonError as error:
                failures += 1
                wait_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
                patient = 0.0 < wait_s <= self._patience_s - waited_s
                broken = isinstance(error.__cause__, httpx.TimeoutException)
                addresses = len(self._urls)
                if not (patient or may_go_on(error, broken, bool(last_id), failures, addresses)):
                    raise
                at = self._at = (at + 1) % addresses
                waited_s += wait_s
                share = random.uniform(0.5, 1.0)
                await asyncio.sleep(pause_before(error, failures, addresses, share))

    async def default_model(self) -> str:
        """The id of the first model that the cluster serves."""
        if not self._model:
            models = (await self._get("/v1/models")).get("data") or []
            if not models:
                raise InternalError(f"{self.url} lists no model")
            self._model = str(models[0]["id"])
        return self._model

    async def cluster(self) -> dict[str, Any]:
        """Conductors, workers and stores as `GET /cluster` lists them."""
        return await self._get("/cluster")

    async def live(self) -> dict[str, Any]:
        """The same with figures of the last minutes, KV flows and the last requests: see
        `GET /live.json`. Raises Unauthenticated or PermissionDenied without an admin's key, where
        keys are asked for."""
        return await self._get("/live.json")

    async def trace(self, request_id: str) -> dict[str, Any]:
        """Spans of one recent request. Raises InvalidRequest when it is not known (any more)."""
        return await self._get(f"/trace/{quote(request_id, safe='')}")

    async def ready(self) -> bool:
        """Whether a request would succeed now. False also when nothing answers."""
        try:
            response = await self._http.get(self.url + "/ready")
        except httpx.HTTPError:
            return False
        return response.status_code == 200

    async def _events(self, url: str, content: bytes, last_id: str) -> AsyncGenerator[Event, None]:
        """Of one connection, after the event `last_id`."""
        headers = {"content-type": "application/json"}
        if last_id:
            headers["last-event-id"] = last_id
        timeouts = self._timeouts(self._silence_s)
        async with (
            self._translated(),
            self._http.stream(
                "POST", url, content=content, headers=headers, timeout=timeouts
            ) as response,
        ):
            if response.is_error:
                raise error_from(response.status_code, await response.aread(), response.headers)
            self._note_promise(response)
            parser = EventParser()
            async for data in response.aiter_bytes():
                for event in parser.feed(data):
                    yield event

    def _note_promise(self, response: httpx.Response) -> None:
        """How long the server's streams may be silent."""
        interval = response.headers.get(KEEPALIVE_HEADER)
        if interval is not None and len(self._urls) > 1:
            self._silence_s = min(SILENT_BEATS * float(interval), self._timeout_s)

    def _timeouts(self, read_s: float) -> httpx.Timeout:
        return httpx.Timeout(self._timeout_s, connect=min(self._timeout_s, 10.0), read=read_s)

    async def _get(self, path: str) -> dict[str, Any]:
        failures = 0
        while True:
            try:
                return await self._get_once(path)
            except PeerGone:
                failures += 1
                self._at = (self._at + 1) % len(self._urls)
                if failures == len(self._urls):
                    raise

    async def _get_once(self, path: str) -> dict[str, Any]:
        async with self._translated():
            response = await self._http.get(self.url + path)
            if response.is_error:
                raise error_from(response.status_code, response.content, response.headers)
            self._note_promise(response)
            return _object(response.content)

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            if why := _tls_failure(error):
                raise PeerGone(f"{self.url} cannot be used: {why}") from error
            raise PeerGone(
                f"nothing answers at {self.url}: start a cluster with `baton serve`, "
                "or name another with --url"
            ) from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"{self.url} did not answer in time") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, httpx.RemoteProtocolError) and "without sending" in reason:
                reason += "; if it wants TLS, write https://"
            raise PeerGone(f"the connection to {self.url} failed: {reason}") from error


def _with_scheme(url: str) -> str:
    return url.rstrip("/") if "://" in url else f"http://{url}".rstrip("/")


def _tls_failure(error: BaseException) -> str:
    """What TLS did not like; empty: it was something else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return (
                f"its certificate is not trusted here: {cause.verify_message}; {CA_FLAG} "
                f"({CA_VARIABLE}) names other authorities"
            )
        if isinstance(cause, ssl.SSLError):
            return f"TLS failed ({cause.reason}); if it does not want TLS, write http://"
        cause = cause.__cause__ or cause.__context__
    return ""


def _object(data: bytes | str) -> dict[str, Any]:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise InternalError("the server sent something that is not JSON") from error
    if not isinstance(parsed, dict):
        raise InternalError("the server sent JSON that is not an object")
    return parsed


def _pieces(data: bytes, chat: bool) -> list[Piece]:
    event = _object(data)
    if (detail := event.get("error")) is not None:
        raise _stream_error(detail)
    request_id = str(event.get("id") or "")
    pieces = [
        Piece(
            text=(choice.get("delta", {}).get("content") if chat else choice.get("text")) or "",
            index=int(choice.get("index", 0)),
            finish_reason=choice.get("finish_reason"),
            request_id=request_id,
            token_ids=tuple(choice.get("token_ids") or ()),
        )
        for choice in event.get("choices") or ()
    ]
    if chat:  # the event that only names the role is not part of the answer
        pieces = [p for p in pieces if p.text or p.token_ids or p.finish_reason]
    if usage := event.get("usage"):
        pieces.append(Piece(usage=_usage(usage), request_id=request_id))
    return pieces


def _stream_error(detail: object) -> BatonError:
    return error_in(detail if isinstance(detail, Mapping) else {"message": str(detail)})


def _usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(usage.get("prompt_tokens", 0)),
        completion_tokens=int(usage.get("completion_tokens", 0)),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )
