"""What conductors are told of the blocks that this process holds: a snapshot, then changes.

One stream of numbered messages per link, because each conductor joins and falls behind by itself.
A conductor that takes its messages too slowly gets a new snapshot instead of a backlog.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from baton.hashing import KEY_BYTES
from baton.types.kv_events import KvEvents, KvSnapshot, Tier

PART_BYTES = 4096 * KEY_BYTES  # of keys in one message of a snapshot
BACKLOG_BYTES = 1 << 20  # of keys that a slow link may have waiting


class Change(NamedTuple):
    """Keys of KEY_BYTES each, concatenated."""

    tier: Tier
    added: bytes
    removed: bytes


class KvBook(Protocol):
    """Whoever holds blocks."""

    def holdings(self) -> Iterable[tuple[Tier, bytes]]:
        """All keys, by tier."""

    def take_changes(self) -> Iterable[Change]:
        """What has changed since the last call, in order."""


class LoanBook(Protocol):
    """An engine's pool as `baton.engine.loans` shows it."""

    def keys(self) -> bytes: ...

    def take_changes(self) -> tuple[bytes, bytes]: ...


@dataclass(frozen=True, slots=True)
class PoolBook:
    """A worker's own pool, which is one tier."""

    pool: LoanBook

    def holdings(self) -> Iterable[tuple[Tier, bytes]]:
        return ((Tier.GPU, self.pool.keys()),)

    def take_changes(self) -> Iterable[Change]:
        added, removed = self.pool.take_changes()
        return (Change(Tier.GPU, added, removed),) if added or removed else ()


class KvNews:
    """Distributes the changes of one book to its subscribers."""

    def __init__(self, book: KvBook) -> None:
        self._book = book
        self._subscribers: set[Subscription] = set()

    def subscribe(self) -> Subscription:
        subscriber = Subscription(self)
        self._subscribers.add(subscriber)
        return subscriber

    def unsubscribe(self, subscriber: Subscription) -> None:
        self._subscribers.discard(subscriber)

    def distribute(self) -> None:
        for change in self._book.take_changes():
            for subscriber in self._subscribers:
                subscriber.note(change)

    def holdings(self) -> Iterable[tuple[Tier, bytes]]:
        return self._book.holdings()


class Subscription:
    """One link's messages. It begins with a snapshot."""

    def __init__(self, news: KvNews) -> None:
        self._news = news
        self._number = 0
        self._backlog: list[Change] = []
        self._backlog_bytes = 0
        self._stale = True  # the next thing to say is a snapshot

    def resync(self) -> None:
        """The conductor has lost count."""
        self._stale = True

    def note(self, change: Change) -> None:
        if self._stale:
            return
        self._backlog.append(change)
        self._backlog_bytes += len(change.added) + len(change.removed)
        self._stale = self._backlog_bytes > BACKLOG_BYTES

    def take(self) -> tuple[KvEvents | KvSnapshot, ...]:
        """Everything that is due now, in order; empty when nothing has changed."""
        self._news.distribute()
        messages: tuple[KvEvents | KvSnapshot, ...]
        messages = tuple(self._snapshot()) if self._stale else tuple(self._events())
        self._stale = False
        self._backlog.clear()
        self._backlog_bytes = 0
        return messages

    def close(self) -> None:
        self._news.unsubscribe(self)

    def _snapshot(self) -> Iterator[KvSnapshot]:
        parts = [
            (tier, keys[at : at + PART_BYTES])
            for tier, keys in self._news.holdings()
            for at in range(0, len(keys), PART_BYTES)
        ] or [(Tier.GPU, b"")]
        for index, (tier, keys) in enumerate(parts):
            number = self._next_number()
            yield KvSnapshot(number, tier, keys, index == 0, index == len(parts) - 1)

    def _events(self) -> Iterator[KvEvents]:
        for change in self._backlog:
            yield KvEvents(self._next_number(), change.tier, change.added, change.removed)

    def _next_number(self) -> int:
        self._number += 1
        return self._number
