"""A value that is made from files, and made again when they change."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from baton.errors import ConfigError

T = TypeVar("T")
Stamp = tuple[int, int, int] | None

log = logging.getLogger("baton.rpc.files")


class FollowedFiles(Generic[T]):
    """`load` reads the files and raises ConfigError when they are not good, which the constructor
    passes on. Later, what is not good (yet: half of a pair was written) is left alone until the
    files change again, and the value stays what it was. Safe to use from any thread."""

    def __init__(self, files: tuple[Path, ...], load: Callable[[], T]) -> None:
        self._files = files
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._look()
        self._value = load()

    def current(self) -> T:
        """The same object until there is something new. Costs a stat per file."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._reload(seen)
            return self._value

    def _reload(self, seen: list[Stamp]) -> None:
        try:
            value = self._load()
        except ConfigError as error:
            log.warning("%s: what was read before stays in use", error.message)
        else:
            if self._look() != seen:
                return  # replaced meanwhile: the next look sees all of it
            self._value = value
            log.info("read again: %s", ", ".join(map(str, self._files)))
        self._seen = seen

    def _look(self) -> list[Stamp]:
        return [_stamp(path) for path in self._files]


def _stamp(path: Path) -> Stamp:
    """Differs when the file was written or replaced, also behind a link, as mounted Secrets are."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
