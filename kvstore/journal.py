"""What changed in which tier since the conductors were told last."""

from __future__ import annotations

from baton.errors import InternalError
from baton.types.kv_events import Tier
from baton.worker.kv_news import Change


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
    """The changes of both tiers."""

    def __init__(self) -> None:
        self._tiers = {tier: TierChanges() for tier in (Tier.CPU, Tier.NVME)}

    def of(self, tier: Tier) -> TierChanges:
        return self._tiers[tier]

    def take(self) -> list[Change]:
        """Everything since the last call, one change for each tier that has some."""
        changes = []
        for tier, journal in self._tiers.items():
            added, removed = journal.take()
            if added or removed:
                changes.append(Change(tier, b"".join(added), b"".join(removed)))
        return changes


def _toggle(key: bytes, to: dict[bytes, None], opposite: dict[bytes, None]) -> None:
    if key in opposite:
        del opposite[key]  # back to what was told
    elif key in to:
        raise InternalError("A block came into or left a tier twice.")
    else:
        to[key] = None
