"""One API key as it is kept, and all that are known.

A key is 32 random bytes. Nobody can try so many, so a plain SHA-256 is as good at rest as a slow
hash, which is for passwords that people choose, and costs a microsecond per request instead of a
tenth of a second. Looking a digest up in a table leaks nothing by its time: who does not have the
key cannot choose what its digest begins with.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from baton.errors import ConfigError

KEY_PREFIX = "bt-"  # by which scanners of source code and logs can tell a leaked key
KEY_BYTES = 32
ID_DIGITS = 12  # of the digest; enough to name a key by, useless to make one from
TENANT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

_TENANT = re.compile(TENANT_NAME)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_DURATION = re.compile(r"([0-9]{1,9})([smhd]?)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NEVER = "-"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`expires_s` is in Unix seconds; None: it holds until it is revoked."""

    tenant: str
    digest: str
    expires_s: float | None = None

    @property
    def id(self) -> str:
        """What people call it by: it may be shown and logged."""
        return self.digest[:ID_DIGITS]

    def holds(self, now_s: float) -> bool:
        return self.expires_s is None or now_s < self.expires_s

    def __str__(self) -> str:
        """As a line of a key file."""
        return f"{self.tenant} {self.digest} {format_expiry(self.expires_s)}"


def new_key() -> str:
    """A key to give away. It is not kept anywhere: only `digest_of` it is."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def parse_key(line: str) -> ApiKey:
    """From `TENANT SHA256 EXPIRES`. Raises ConfigError, which does not repeat the line: somebody
    may have written a key there."""
    parts = line.split()
    if len(parts) not in (2, 3):
        raise ConfigError("a line must be `TENANT SHA256 EXPIRES`; EXPIRES is - for never")
    tenant, digest = parts[0], parts[1].lower()
    check_tenant_name(tenant)
    if not _DIGEST.fullmatch(digest):
        raise ConfigError(
            "the second word must be the SHA-256 of a key, 64 hexadecimal digits: "
            "`baton keys create` writes such lines"
        )
    return ApiKey(tenant, digest, parse_expiry(parts[2] if len(parts) == 3 else _NEVER))


def check_tenant_name(name: str) -> None:
    """Raises ConfigError."""
    if not _TENANT.fullmatch(name):
        raise ConfigError(
            "a tenant's name must have 1 to 64 letters, digits, '.', '_' or '-', and begin with a "
            "letter or a digit"
        )


def format_expiry(expires_s: float | None) -> str:
    if expires_s is None:
        return _NEVER
    return datetime.fromtimestamp(expires_s, UTC).isoformat(timespec="seconds")


def parse_expiry(text: str) -> float | None:
    """Raises ConfigError."""
    if text == _NEVER:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        at = None
    if at is None or at.tzinfo is None:
        raise ConfigError(
            "the end of a key must be written as 2026-01-31T12:00:00+00:00, or - for never"
        )
    return at.timestamp()


def parse_duration(text: str) -> float:
    """Seconds, from 90, 90s, 15m, 12h or 30d. Raises ConfigError."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is no time: write 90s, 15m, 12h or 30d")
    return float(match[1]) * _SECONDS[match[2] or "s"]


class KeySet:
    """All keys that are known. Never changes: another set takes its place."""

    def __init__(self, keys: Iterable[ApiKey] = ()) -> None:
        self._by_digest: Mapping[str, ApiKey] = {key.digest: key for key in keys}

    def __len__(self) -> int:
        return len(self._by_digest)

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        return tuple(self._by_digest.values())

    def find(self, key: str, now_s: float) -> ApiKey | None:
        """None for a key that is unknown, or whose time has passed."""
        found = self._by_digest.get(digest_of(key))
        return found if found is not None and found.holds(now_s) else None
