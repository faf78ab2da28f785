"""Lets a step begin on KV that is still coming: it waits for each group of layers when it needs it.

    loop:    open(7)   open(14)           open(21)   open(28)   settle(True)
    thread:  wait(7)   wait(14) . . . . . . . wait(21)   wait(28)   settled() . . -> True: it counts

What the step computes is worth nothing before all of the KV is known to be good. If that is not
said, or if a wait ends in vain, the step counts as never run, and the sequence waits as if it had
not begun.
"""

from __future__ import annotations

import threading

PATIENCE_S = 1.0
"""For one wait. While others have something to compute, no layer is waited for at all."""


class GateClosed(Exception):
    """The KV that a step began on does not come, or not soon enough."""


class Gate:
    """Between the event loop, which hears what has come, and the threads of one step."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._patience_s = PATIENCE_S  # for layers
        self._came = 0  # layers
        self._good: bool | None = None  # None: more may come
        self._closed = False

    # -- on the event loop, never blocking ----------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether a step may begin: there is something to begin on, and none gave up before."""
        return self._came > 0 and not self._closed

    def open(self, layer_end: int) -> None:
        """Layers [0, layer_end) have come."""
        with self._changed:
            self._came = max(self._came, layer_end)
            self._changed.notify_all()

    def settle(self, good: bool) -> bool:
        """Nothing more comes; everything has come and is known to be what it should be, or not.
        Whether the step counts, unless it fails: from here on, nothing else prevents that."""
        with self._changed:
            self._good = good and not self._closed
            self._changed.notify_all()
            return self._good

    def close(self) -> None:
        """Nobody wants the step any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def give_way(self) -> None:
        """Others have something to compute: go on only as long as the layers are there."""
        with self._changed:
            self._patience_s = 0.0
            self._changed.notify_all()

    # -- in the step's threads ----------------------------------------------------------------

    def wait(self, layer_end: int) -> None:
        """Return when layers [0, layer_end) are there. Raises GateClosed."""
        with self._changed:
            while not (self._came >= layer_end or self._good or self._hopeless):
                if not self._patience_s or not self._changed.wait(self._patience_s):
                    self._closed = True
            if self._hopeless:
                raise GateClosed

    def settled(self) -> bool:
        """Whether all the KV came and is good; waits for the word."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._good is not None, PATIENCE_S)
            self._closed = self._closed or not self._good
            return bool(self._good)

    @property
    def _hopeless(self) -> bool:
        return self._closed or self._good is False
