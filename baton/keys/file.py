"""Keys in a file: one line for each, `TENANT SHA256 EXPIRES`; `#` begins a comment.

Whoever reads it sees all of the old file or all of the new one: changes are written beside it and
renamed. Comments and order stay.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from baton.errors import ConfigError
from baton.keys.key import ApiKey, KeySet, parse_key

MAX_BYTES = 64 << 20  # half a million keys
_MODE = 0o600
_HEADER = "# Keys of tenants, by their SHA-256: TENANT SHA256 EXPIRES. `baton keys` writes them.\n"


def read_keys(path: Path) -> KeySet:
    """Raises ConfigError, which names the line."""
    return KeySet(key for _, key in _parse(path, _read(path)) if key is not None)


class KeyFile:
    """Implements KeyStore. Two processes that change a file at once take turns. Its calls wait for
    the disk: they are for a command, not for a server."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def read(self) -> KeySet:
        """Raises ConfigError, also when there is no such file."""
        return read_keys(self._path)

    async def add(self, key: ApiKey) -> None:
        """Makes the file when there is none."""
        with self._changing(missing_ok=True) as (lines, save):
            save([*lines, f"{key}\n"])

    async def replace(self, key_id: str, change: Callable[[ApiKey], ApiKey | None]) -> ApiKey:
        """`change` what is kept of a key; None takes it out. Returns what it was. Raises
        ConfigError when there is no such key."""
        with self._changing() as (lines, save):
            found: ApiKey | None = None
            kept: list[str] = []
            for line, key in _parse(self._path, "".join(lines)):
                if key is None or key.id != key_id:
                    kept.append(line)
                    continue
                found = key
                changed = change(key)
                if changed is not None:
                    kept.append(f"{changed}\n")
            if found is None:
                raise ConfigError(f"{self._path} has no key {key_id!r}: see `baton keys list`")
            save(kept)
            return found

    async def aclose(self) -> None:
        return

    @contextmanager
    def _changing(
        self, missing_ok: bool = False
    ) -> Iterator[tuple[list[str], Callable[[list[str]], None]]]:
        """The lines, and how to write others; nobody else changes the file meanwhile."""
        try:
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise ConfigError(f"cannot open {self._path.parent}: {error.strerror}") from error
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            is_new = missing_ok and not self._path.exists()
            text = _HEADER if is_new else _read(self._path)
            lines = text.splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):
                lines[-1] += "\n"
            yield lines, self._save
        finally:
            os.close(folder)

    def _save(self, lines: list[str]) -> None:
        beside = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        try:
            beside.touch(_MODE, exist_ok=False)
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None


def _parse(path: Path, text: str) -> Iterator[tuple[str, ApiKey | None]]:
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        content = line.partition("#")[0].strip()
        if not content:
            yield line, None
            continue
        try:
            yield line, parse_key(content)
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error.message}") from None
