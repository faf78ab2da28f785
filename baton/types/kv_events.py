"""Who holds which KV blocks: what workers and stores tell every conductor.

A *holder* (a worker, with its pool; a node's store, with its tiers) is the truth about its blocks.
It sends a snapshot in parts, then events, in the order of their numbers and on one ordered stream:

    KvSnapshot 0 (first)   KvSnapshot 1   KvSnapshot 2 (last)   KvEvents 3   KvEvents 4   ...

Numbers grow by one per message of a holder, over all its tiers. When one is missing, the conductor
no longer knows what the holder has: it forgets all of it, ignores what follows, and asks the holder
for a snapshot. So does a conductor that has just started, or a holder that was started again: its
next message is the first part of a snapshot, with any number, and counting goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Where a holder keeps a block, fastest first."""

    GPU = "gpu"  # a worker's own pool, also when that pool is in the memory of a CPU
    CPU = "cpu"
    NVME = "nvme"


@dataclass(frozen=True, slots=True)
class KvEvents:
    """Holder -> conductor: what changed in one tier since the holder's last message.

    `added` and `removed` are keys of `baton.hashing.KEY_BYTES` each, concatenated; a key that is in
    both has been removed. Adding what is there and removing what is not are no errors.
    """

    number: int
    tier: Tier
    added: bytes = b""
    removed: bytes = b""


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """Holder -> conductor: a part of everything that the holder has, all of it in one tier.

    The part with `first` replaces all that was known of the holder, in every tier; the parts after
    it add to that, up to the one with `last`. A holder without any block sends one empty part that
    is both. Events between two parts are allowed: they are numbered like everything else. Parts of
    some thousand keys, a millisecond each, let the conductor do other things in between.
    """

    number: int
    tier: Tier
    keys: bytes
    first: bool
    last: bool
