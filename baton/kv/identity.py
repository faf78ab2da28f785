"""Who exchanges KV blocks, and whether two sides can."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from baton.errors import ConfigError
from baton.kv.layout import check_layouts
from baton.types.fleet import KvLayout

SHORTEST_TTL_S, LONGEST_TTL_S = 0.01, 86_400.0


@dataclass(frozen=True, slots=True)
class Identity:
    """This life of this process, and the blocks it holds."""

    name: str
    incarnation: str
    layout: KvLayout


def new_incarnation() -> str:
    """Of a process that starts."""
    return uuid.uuid4().hex[:12]


def life(name: str, incarnation: str) -> str:
    """What transports and messages call one life of a process. Unique in a cluster."""
    return f"{name}/{incarnation}"


def is_ttl(seconds: float) -> bool:
    """Whether a peer may name this as its leases' time to live. It is renewed every third of it:
    less would be a storm of renewals, and what is not a number no time at all."""
    return SHORTEST_TTL_S <= seconds <= LONGEST_TTL_S


def check_peer(ours: Identity, our_transport: str, theirs: Identity, their_transport: str) -> None:
    """Raises LayoutMismatch or ConfigError when the two sides cannot exchange blocks."""
    check_layouts(ours.layout, ours.name, theirs.layout, theirs.name)
    if their_transport != our_transport:
        raise ConfigError(
            f"{ours.name} moves KV by {our_transport} and {theirs.name} by {their_transport}; "
            "start both with the same --transport"
        )
