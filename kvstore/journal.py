"""What changed in which tier since the conductors were told last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from baton.errors import InternalError
from baton.types.kv_events import KvEvents, KvSnapshot, Tier

KEYS_PER_MESSAGE = 16384
"""256 KiB of keys: far below what a gRPC message may have."""


class TierChanges:
    """The difference of one tier to what was told, one entry per key however often it changes.

    Bounded without anybody who drains it: by what the tier held then and holds now.
    """

    def __init__(self) -> None:
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def add(self, key: bytes) -> None:
        _toggle(key, self._added, self._removed)

    def remove(self, key: bytes) -> None:
        _toggle(key, self._removed, self._added)

    def take(self) -> tuple[list[bytes], list[bytes]]:
        """(added, removed) since the last call; no key is in both."""
        added, removed = list(self._added), list(self._removed)
        self._added.clear()
        self._removed.clear()
        return added, removed


class Journal:
    """The only numbering of a store's messages to conductors (see `baton.types.kv_events`)."""

    def __init__(self) -> None:
        self._number = 0
        self._tiers = {tier: TierChanges() for tier in (Tier.CPU, Tier.NVME)}

    def of(self, tier: Tier) -> TierChanges:
        return self._tiers[tier]

    def take_events(self) -> list[KvEvents]:
        """Everything since the last call of this or `snapshot`."""
        events = []
        for tier, changes in self._tiers.items():
            added, removed = changes.take()
            for part in _parts(added):
                events.append(KvEvents(self._next(), tier, added=part))
            for part in _parts(removed):
                events.append(KvEvents(self._next(), tier, removed=part))
        return events

    def snapshot(self, holdings: Iterable[tuple[Tier, Iterable[bytes]]]) -> list[KvSnapshot]:
        """The messages that replace all that was told: `holdings` says what each tier has."""
        for changes in self._tiers.values():
            changes.take()
        parts = [(tier, part) for tier, keys in holdings for part in _parts(keys)]
        parts = parts or [(Tier.CPU, b"")]
        last = len(parts) - 1
        return [
            KvSnapshot(self._next(), tier, part, first=n == 0, last=n == last)
            for n, (tier, part) in enumerate(parts)
        ]

    def _next(self) -> int:
        self._number += 1
        return self._number


def _toggle(key: bytes, to: dict[bytes, None], opposite: dict[bytes, None]) -> None:
    if key in opposite:
        del opposite[key]  # back to what was told
    elif key in to:
        raise InternalError("A block came into or left a tier twice.")
    else:
        to[key] = None


def _parts(keys: Iterable[bytes]) -> Iterator[bytes]:
    rest = iter(keys)
    while part := b"".join(islice(rest, KEYS_PER_MESSAGE)):
        yield part
