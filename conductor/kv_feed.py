"""Feeds the prefix map from the links, and asks holders for snapshots when it has lost track."""

from __future__ import annotations

from collections.abc import Callable

from baton.types.kv_events import KvEvents, KvSnapshot
from baton.types.link import Resync
from conductor.prefix_map import PrefixMap

Post = Callable[[Resync], None]


class KvFeed:
    """One `Resync` at most is on its way to a holder: what it said before is ignored till then."""

    def __init__(self, prefix_map: PrefixMap) -> None:
        self.map = prefix_map
        self.gaps = 0  # that were found in what holders said
        self._asked: set[str] = set()  # holders whose snapshot has not begun yet

    def on_link(self, holder: str, post: Post) -> None:
        """A link to the holder is up: what it had before is what it will tell."""
        self.drop(holder)
        self._ask(holder, post)

    def on_message(self, holder: str, message: KvEvents | KvSnapshot, post: Post) -> None:
        if isinstance(message, KvSnapshot) and message.first:
            self._asked.discard(holder)
        elif holder in self._asked:
            return
        if not self.map.apply(holder, message):
            self.gaps += 1
            self._ask(holder, post)

    def drop(self, holder: str) -> None:
        """The holder is dead, or cannot be heard any more."""
        self._asked.discard(holder)
        self.map.drop(holder)

    def _ask(self, holder: str, post: Post) -> None:
        self._asked.add(holder)
        post(Resync())
