"""Who takes part in handoffs, and with which limits."""

from __future__ import annotations

from dataclasses import dataclass

from baton.errors import ConfigError
from baton.kv.handoff.digest import Verify
from baton.kv.layout import check_layouts
from baton.types.fleet import KvLayout
from baton.types.handoff import Hello


@dataclass(frozen=True, slots=True)
class Identity:
    """This life of this worker, and the blocks it holds."""

    name: str
    incarnation: str
    layout: KvLayout


@dataclass(frozen=True, slots=True)
class HandoffOptions:
    lease_ttl_s: float = 10.0  # published KV that nobody renews returns after this
    attach_timeout_s: float = 30.0  # how long an attach may wait for an unknown attempt
    hello_timeout_s: float = 10.0  # for dialling and greeting together
    linger_s: float = 30.0  # a source still helps on reads that were given up; then they are cut
    verify: Verify = Verify.SAMPLE  # said by the publisher, followed by the reader
    inline_digest_bytes: int = 2 << 20  # up to so many are hashed on the event loop (< 0.5 ms)
    max_reads: int = 64  # transfers under way at a time, per pair of workers


def life(name: str, incarnation: str) -> str:
    """What transports and messages call one life of a worker. Unique in a cluster."""
    return f"{name}/{incarnation}"


def check_hello(ours: Identity, transport: str, hello: Hello) -> None:
    """Raises LayoutMismatch or ConfigError when the two sides cannot exchange blocks."""
    check_layouts(ours.layout, ours.name, hello.layout, hello.worker)
    if hello.transport != transport:
        raise ConfigError(
            f"{ours.name} moves KV by {transport} and {hello.worker} by {hello.transport}; "
            "start both with the same --transport"
        )
