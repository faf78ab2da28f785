"""Messages on a handoff stream: one per (decode worker, prefill worker) pair, all their attempts.

The decode worker dials, says Hello and attaches attempts; the prefill worker publishes ranges of
blocks under a lease; the decode worker reads them by transport, renews, and releases.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.types.fleet import KvLayout
from baton.types.request import AttemptId, SampledToken, WireError
from baton.types.trace import TraceContext


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of each side. `endpoint` is what the transport's `connect` takes."""

    worker: str
    incarnation: str
    layout: KvLayout
    transport: str
    endpoint: bytes
    lease_ttl_s: float = 0.0  # said by the prefill side
    expected_incarnation: str = ""  # said by the decode side: the life it was routed to


@dataclass(frozen=True, slots=True)
class Attach:
    attempt: AttemptId
    trace: TraceContext | None = None


@dataclass(frozen=True, slots=True)
class Renew:
    attempts: tuple[AttemptId, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """All ranges were read and verified. `digest` sums up what was read (empty: verify off)."""

    attempt: AttemptId
    digest: bytes = b""


@dataclass(frozen=True, slots=True)
class Abort:
    attempt: AttemptId
    reason: str


DecodeMessage = Hello | Attach | Renew | Release | Abort


@dataclass(frozen=True, slots=True)
class Ranges:
    """Layers [layer_begin, layer_end) of some blocks are final and may be read while leased.

    `first_block` is the logical index in the sequence of `blocks[0]`; `blocks` are indices into the
    prefill worker's pool. `digests` is empty or has one digest per block.
    """

    attempt: AttemptId
    first_block: int
    blocks: tuple[int, ...]
    layer_begin: int
    layer_end: int
    digests: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Every range of the attempt has been published, and this is the first token of the answer."""

    attempt: AttemptId
    first: SampledToken
    num_blocks: int  # logical blocks that were published, over all layers
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Released:
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Expired:
    """The lease ended before the release: everything read under it is void."""

    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Refused:
    """The attempt will not be handed over (unknown, stale, cancelled, failed, layout mismatch).

    Without an attempt, the whole stream is refused.
    """

    attempt: AttemptId | None
    error: WireError


PrefillMessage = Hello | Ranges | Prefilled | Released | Expired | Refused
