"""Server-sent events out of the bytes of a stream, as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Event(NamedTuple):
    """`id` is empty when the event has none; `data` when it has no data."""

    id: str
    data: bytes


class EventParser:
    """An event counts when it is whole: what a connection broke off in the middle of is not there.

    Lines end with LF or CRLF only. (JSON may have other line separators in its strings, at which
    `str.splitlines` would cut.)
    """

    def __init__(self) -> None:
        self._rest = b""
        self._id = ""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[Event]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif line.startswith(b"id:"):
                self._id = line[3:].strip().decode("latin-1")
            elif not line and (self._data or self._id):
                yield Event(self._id, b"\n".join(self._data))
                self._id, self._data = "", []
