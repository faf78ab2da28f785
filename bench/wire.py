"""HTTP/1.1 responses with server-sent events, as bytes come in. Pure parsing, no I/O.

It knows as much of both as an OpenAI-shaped answer needs, so that the client, which shares the
cores with the server that it measures, stays light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

_MAX_HEAD = 64 << 10


class WireError(Exception):
    """The server sent something that is not an answer of this kind."""


class ResponseParser:
    """Feed it what a socket delivers; it returns the payloads of `data:` lines as they complete.

    `status` is None until the head has come. A body that is no event stream is kept in `body`.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.ended = False  # by its own framing; a body without any ends with the connection
        self.body = b""
        self._raw = b""
        self._line = b""
        self._chunked = False
        self._events = False
        self._left: int | None = None  # bytes still to come of this chunk, or of the whole body

    def feed(self, data: bytes) -> list[bytes]:
        """Raises WireError for a broken head or chunk."""
        self._raw += data
        if self.status is None and not self._read_head():
            return []
        body = self._dechunk() if self._chunked else self._plain()
        if not self._events:
            self.body += body
            return []
        *lines, self._line = (self._line + body).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def _read_head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if not found:
            if len(head) > _MAX_HEAD:
                raise WireError("the head of the response does not end")
            return False
        first, *lines = head.split(b"\r\n")
        parts = first.split(b" ", 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise WireError(f"not an HTTP/1.1 response: {first[:60]!r}")
        fields = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip().lower()
        self.status = int(parts[1])
        self._events = fields.get(b"content-type", b"").startswith(b"text/event-stream")
        self._chunked = fields.get(b"transfer-encoding") == b"chunked"
        if not self._chunked and b"content-length" in fields:
            self._left = int(fields[b"content-length"])
        self._raw = rest
        return True

    def _plain(self) -> bytes:
        body, self._raw = self._raw, b""
        if self._left is not None:
            self._left -= len(body)
            self.ended = self._left <= 0
        return body

    def _dechunk(self) -> bytes:
        body = b""
        while not self.ended:
            if self._left is None:
                size, found, rest = self._raw.partition(b"\r\n")
                if not found:
                    break
                try:
                    self._left = int(size.partition(b";")[0], 16)
                except ValueError:
                    raise WireError(f"not the size of a chunk: {size[:20]!r}") from None
                self._raw = rest
                self.ended = self._left == 0
                continue
            if len(self._raw) < self._left + 2:
                break  # small chunks: waiting for the whole one costs nothing
            body += self._raw[: self._left]
            self._raw = self._raw[self._left + 2 :]
            self._left = None
        return body


@dataclass(frozen=True, slots=True)
class Event:
    """What one payload of a completion stream says. `usage` is OpenAI's object."""

    text: str = ""
    finished: bool = False
    usage: dict[str, Any] | None = None
    error: str | None = None


def read_event(payload: bytes) -> Event:
    """Raises WireError when the payload is not a JSON object."""
    if payload == b"[DONE]":
        return Event(finished=True)
    try:
        content = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise WireError(f"not JSON: {payload[:60]!r}") from None
    if not isinstance(content, dict):
        raise WireError(f"not a JSON object: {payload[:60]!r}")
    if error := content.get("error"):
        message = error.get("message") if isinstance(error, dict) else error
        return Event(error=str(message))
    choices = content.get("choices")
    choice = choices[0] if choices else {}
    return Event(
        text=choice.get("text") or "",
        finished=choice.get("finish_reason") is not None,
        usage=content.get("usage"),
    )
