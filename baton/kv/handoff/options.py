"""With which limits handoffs are made, and between whom."""

from __future__ import annotations

from dataclasses import dataclass

from baton.kv.digest import Verify
from baton.kv.identity import Identity, check_peer
from baton.types.handoff import Hello


@dataclass(frozen=True, slots=True)
class HandoffOptions:
    lease_ttl_s: float = 10.0  # published KV that nobody renews returns after this
    attach_timeout_s: float = 30.0  # how long an attach may wait for an unknown attempt
    hello_timeout_s: float = 10.0  # for dialling and greeting together
    linger_s: float = 30.0  # a source still helps on reads that were given up; then they are cut
    verify: Verify = Verify.SAMPLE  # said by the publisher, followed by the reader
    inline_digest_bytes: int = 2 << 20  # up to so many are hashed on the event loop (< 0.5 ms)
    max_reads: int = 64  # transfers under way at a time, per pair of workers


def check_hello(ours: Identity, transport: str, hello: Hello) -> None:
    """Raises LayoutMismatch or ConfigError when the two sides cannot exchange blocks."""
    theirs = Identity(hello.worker, hello.incarnation, hello.layout)
    check_peer(ours, transport, theirs, hello.transport)
