"""Where a span belongs: W3C Trace Context (level 1), as headers carry it.

    traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01
                 version, trace id, parent's span id, flags (bit 0: sampled)

What is malformed is ignored, and a new trace begins: a client's header never fails a request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
MAX_STATE = 512  # characters that are passed on
_MAX_MEMBERS = 32
_SAMPLED = 0x01

_PARENT = re.compile(
    "(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
    "(?P<more>-.*)?"
)
_KEY = r"(?:[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13})"
_VALUE = r"[\x20-\x2b\x2d-\x3c\x3e-\x7e]{0,255}[\x21-\x2b\x2d-\x3c\x3e-\x7e]"
_MEMBER = re.compile(f"(?P<key>{_KEY})={_VALUE}")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span that others may be children of. Ids are lower-case hex digits, never all zeros."""

    trace_id: str  # 32 digits
    span_id: str  # 16 digits
    sampled: bool
    state: str = ""  # `tracestate`: what other tracing systems on the way want to know

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"

    def child(self, name: str) -> TraceContext:
        """The context of this span's child of that name, the same whoever asks."""
        span_id = span_id_of(f"{self.trace_id} {self.span_id} {name}")
        return TraceContext(self.trace_id, span_id, self.sampled, self.state)


def parse_trace_context(
    traceparent: Sequence[str], tracestate: Sequence[str]
) -> TraceContext | None:
    """From all values of both headers. None when there is not exactly one valid `traceparent`;
    a malformed `tracestate` is left out."""
    if len(traceparent) != 1:
        return None
    found = _PARENT.fullmatch(traceparent[0])
    if found is None or found["version"] == "ff" or (found["version"] == "00" and found["more"]):
        return None
    if not (int(found["trace"], 16) and int(found["span"], 16)):
        return None
    sampled = bool(int(found["flags"], 16) & _SAMPLED)
    return TraceContext(found["trace"], found["span"], sampled, _parse_state(tracestate))


def _parse_state(headers: Sequence[str]) -> str:
    """The members in order; empty when one is malformed, there are two of a key, or too many."""
    members = [member.strip(" \t") for header in headers for member in header.split(",")]
    members = [member for member in members if member]
    found = [_MEMBER.fullmatch(member) for member in members]
    keys = {match["key"] for match in found if match is not None}
    joined = ",".join(members)
    good = len(keys) == len(members) <= _MAX_MEMBERS and len(joined) <= MAX_STATE
    return joined if good else ""


def trace_id_of(name: str) -> str:
    """A trace id for what has a unique name: the same wherever it is made."""
    return _digits(name, 16)


def span_id_of(name: str) -> str:
    return _digits(name, 8)


def _digits(name: str, size: int) -> str:
    digits = blake2b(name.encode(), digest_size=size).hexdigest()
    return digits if int(digits, 16) else "1".zfill(2 * size)
