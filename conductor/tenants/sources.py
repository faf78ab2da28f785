"""Where keys and tenants are read from, again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from baton.keys.key import KeySet
from baton.keys.store import VersionedKeys

Value = TypeVar("Value")
Read = TypeVar("Read", covariant=True)


class Source(Protocol[Read]):
    async def read(self) -> Read | None:
        """None when nothing has changed since the last time. Raises ConfigError or
        RegistryUnavailable."""

    async def aclose(self) -> None: ...


class FileSource(Generic[Value]):
    """What `parse` makes of a file. Parsing runs in a thread: streams go on meanwhile."""

    def __init__(self, path: Path, parse: Callable[[Path], Value]) -> None:
        self._path = path
        self._parse = parse
        self._seen: tuple[int, ...] | None = None

    async def read(self) -> Value | None:
        seen = _stamp(self._path)
        if seen is not None and seen == self._seen:
            return None
        self._seen = seen  # also when it is wrong: that is said once
        return await asyncio.to_thread(self._parse, self._path)

    async def aclose(self) -> None:
        return


class StoreSource:
    """The keys in Redis, when their number says that they have changed."""

    def __init__(self, store: VersionedKeys) -> None:
        self._store = store
        self._version: int | None = None

    async def read(self) -> KeySet | None:
        if self._version is not None and await self._store.version() == self._version:
            return None
        self._version, keys = await self._store.read_with_version()
        return keys

    async def aclose(self) -> None:
        await self._store.aclose()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Changes with the file. None when there is none: reading it then says so."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
