"""What failing calls to a disk lead to: a pause when it is full, the end of its tier when it fails
too often."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable

from kvstore.disk_options import DiskOptions, DiskState, DiskStats

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskHealth:
    """The only owner of a tier's state. OFF until `begin`."""

    def __init__(
        self,
        options: DiskOptions,
        stats: DiskStats,
        on_pause: Callable[[], None],
        on_off: Callable[[], None],
    ) -> None:
        self.why = ""  # the tier is paused or off, when it is
        self.off = True
        self._options = options
        self._stats = stats
        self._on_pause = on_pause
        self._on_off = on_off
        self._resume_at = 0.0
        self._strikes = 0  # failures other than a full disk

    @property
    def state(self) -> DiskState:
        if self.off:
            return DiskState.OFF
        paused = asyncio.get_running_loop().time() < self._resume_at
        return DiskState.PAUSED if paused else DiskState.ON

    def begin(self) -> None:
        self.off = False

    def cannot_begin(self, error: OSError) -> None:
        self._stats.errors += 1
        self.why = str(error)
        log.error(
            "The NVMe tier in %s is off: %s. Serving goes on without it; make the directory "
            "usable and start the store again",
            self._options.directory,
            error,
        )

    def end(self) -> None:
        """In order: nothing failed."""
        self.off = True

    def failed(self, what: str, error: OSError) -> None:
        self._stats.errors += 1
        if error.errno in _FULL:
            self.pause(str(error))
            return
        log.warning("The NVMe tier could not %s: %s", what, error)
        self._strikes += 1
        if self._strikes >= self._options.error_limit and not self.off:
            self.turn_off(f"{self._strikes} errors, the last: {error}")

    def pause(self, why: str) -> None:
        self._stats.pauses += 1
        self._resume_at = asyncio.get_running_loop().time() + self._options.pause_s
        self.why = why
        log.warning(
            "The NVMe tier in %s takes no blocks for %g s: %s. Make room there, or give the store "
            "a smaller --disk-gib",
            self._options.directory,
            self._options.pause_s,
            why,
        )
        self._on_pause()

    def turn_off(self, why: str) -> None:
        self.why = why
        log.error(
            "The NVMe tier in %s is off: %s. Serving goes on without it; check the disk and start "
            "the store again",
            self._options.directory,
            why,
        )
        self.off = True
        self._on_off()
